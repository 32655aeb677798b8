"""Given responses as trajectories and as targets; their cache. `pytest tests/deploy/run/test_given_responses.py`"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray.exceptions import OutOfDiskError, RayError, RayTaskError

from opdlm.actors.teacher.actor import ScoreStats
from opdlm.actors.teacher.generation import generate
from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.data.prompts import Prompt, PromptOrder
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.masks import training_mask
from opdlm.common.model.load import hidden_states
from opdlm.common.model.shards import weights_fingerprint
from opdlm.common.retry import StoreWait
from opdlm.common.samples import SampleRef
from opdlm.common.types import ScoredTrajectory, WeightHandle
from opdlm.deploy.observe.progress import RunProgress
from opdlm.deploy.run import given_responses as offline
from opdlm.deploy.run.scoring import Scoring
from opdlm.deploy.run.sources import GivenSource, given_trajectory
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import collate
from opdlm.learner.rows import build_rows
from opdlm.learner.targets import gather_targets
from tests.tiny import EOS, MASK, VOCABULARY, request, save_teacher, tiny_model


@pytest.mark.parametrize("kind", ["absolute", "response"])
@pytest.mark.parametrize("prompt_length", [1, 4, 6])
def test_a_given_response_fills_its_last_block_with_end_tokens(kind, prompt_length) -> None:
    grid = BlockGrid(4, kind)
    made = given_trajectory(3, "p", np.arange(prompt_length), np.array([7, 8, 9, EOS, 5]), 99, [EOS], grid, version=2)
    assert made.response.tolist() == [7, 8, 9, EOS]  # tokens after the end are left out
    assert (made.finish_reason, made.weight_version, made.index) == ("eos", 2, 3)
    assert (prompt_length + grid.offset(prompt_length) + len(made.response_ids)) % 4 == 0
    assert set(made.response_ids[4:].tolist()) <= {EOS}


@pytest.mark.parametrize("kind", ["absolute", "response"])
@pytest.mark.parametrize("prompt_length", [1, 4, 6])
@pytest.mark.parametrize("limit", [1, 5, 6, 9, 11])
def test_a_cut_response_never_shows_a_false_end(kind, prompt_length, limit) -> None:
    grid, prompt = BlockGrid(4, kind), np.arange(prompt_length)
    response = np.array([7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, EOS])
    made = given_trajectory(3, "p", prompt, response, limit, [EOS], grid, version=2)
    assert (made.finish_reason, made.response_length) == ("length", limit)
    assert made.response_ids.tolist() == response[: len(made.response_ids)].tolist(), "the fill continues the response"
    unknown = given_trajectory(3, "p", prompt, response[:11], 11, [EOS], grid, version=2)
    assert unknown.finish_reason == "length"
    assert 8 <= unknown.response_length == len(unknown.response_ids) <= 11, "it ends with its last whole block"
    assert EOS not in unknown.response_ids


def test_cft_is_cross_entropy_on_the_masked_clean_tokens() -> None:
    """The loss of the learner's path equals a direct cross-entropy over the same masked row."""
    student, grid = tiny_model(3), BlockGrid(4, "absolute")
    objective = ObjectiveConfig(kind="cft", exclude_eos=False)
    prompt = request(6).prompt_ids
    response = np.array([5, 9, 11, 4, 8, EOS], dtype=np.int32)
    trajectory = given_trajectory(0, "p", prompt, response, 99, [EOS], grid, 0)
    source = _source([Prompt("p", prompt, response=response)], "cft")
    scored = ScoredTrajectory(trajectory, source._one_hot(trajectory))
    (row,) = build_rows(scored, grid, objective, MASK, np.random.default_rng(0))
    assert len(row.loss_positions) >= 2
    batch = collate([row])
    module = DistillModule(student, objective, logits_chunk=3)
    _, losses = module(batch, gather_targets([row], None, objective), torch.ones(len(row.loss_positions)))
    mask = training_mask(batch.samples, batch.copies, batch.blocks)
    hidden = hidden_states(student, batch.input_ids, batch.position_ids, mask)
    logits = student.lm_head(hidden[0, row.loss_columns])
    labels = torch.tensor(response[row.loss_positions], dtype=torch.int64)
    direct = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(losses, direct.detach(), rtol=1e-5)


def _config(**sections):
    base = {"model": {"teacher": "t"}, "data": {"path": "p"}, "rollout": {"max_new_tokens": 12}}
    return config_from_dict(base | sections)


def _source(prompts, kind: str, teachers=None) -> GivenSource:
    config = _config(objective={"kind": kind})
    responses = {p.prompt_id: p.response for p in prompts}

    class Quiet:
        progress = RunProgress()

        def scored(self, stats) -> None: ...

    scoring = Scoring(teachers, Quiet(), per_reference=2, batch_tokens=64, round_size=4)
    return GivenSource(config, scoring, PromptOrder(prompts, 0, 1), responses, VOCABULARY, [EOS])


def test_off_policy_samples_are_scored_and_belong_to_the_current_version(monkeypatch) -> None:
    prompts = [Prompt(str(i), request(3, i).prompt_ids, response=np.array([4, 5, i, EOS])) for i in (6, 7, 8)]
    asked: list[tuple] = []

    class Teachers:
        serving = 1

        async def call_late(self, method, arguments):
            (places, per_reference, _, *groups), outputs = arguments()
            asked.append((method, [groups[group][place] for group, place in places], per_reference, outputs))
            return ["first", "second"], ScoreStats(12, 18, 0.1, 0, ((3, 4), (3, 5), (3, 3)))

    source = _source(prompts, "off_policy_kd", Teachers())

    reference = type("Reference", (list,), {"__hash__": object.__hash__})  # one that holds the value
    monkeypatch.setattr("opdlm.deploy.run.sources.ray.put", reference)
    samples, versions = asyncio.run(source.sample([0, 1, 2], WeightHandle(5, [], 0)))
    assert samples == [SampleRef("first", 0, 3, 4), SampleRef("first", 1, 3, 5), SampleRef("second", 0, 3, 3)]
    assert versions == [5, 5, 5]
    ((method, trajectories, per_reference, outputs),) = asked
    assert (method, per_reference, outputs) == ("score", 2, 2)
    order = source.order
    assert [t.response.tolist() for t in trajectories] == [order[i].response.tolist() for i in (0, 1, 2)]


class Teachers:
    """Answers with a tiny teacher. The calls in `fail_at`, counted from 1, fail."""

    def __init__(self, fail_at: tuple[int, ...] = (), error: Exception | None = None) -> None:
        self.model, self.calls, self.fail_at = tiny_model(vocab_size=17), 0, fail_at
        self.error = error or RayError("out of memory")
        self.prompts = 0

    async def call(self, method, ids, limit, batch, temperature, seed):
        assert method == "generate"
        self.calls += 1
        self.prompts += len(ids)
        if self.calls in self.fail_at:
            raise self.error
        return None, (generate(self.model, ids, limit, [EOS], batch, temperature, seed), 0.1)


@pytest.fixture
def cached(tmp_path):
    """A config whose cache holds the responses of a tiny teacher, the prompts, and the responses."""
    save_teacher(tmp_path / "teacher")
    config = _config(
        model={"teacher": str(tmp_path / "teacher")},
        objective={"kind": "cft"},
        offline={"cache": str(tmp_path / "sub" / "c.parquet"), "batch_size": 1},
    )
    prompts = [Prompt(f"p{i}", request(3 + i, i, vocab=17).prompt_ids) for i in range(6)]
    made_of = offline.response_recipe(config, "digest")
    given = asyncio.run(offline.generate_responses(config, prompts, Teachers(), made_of, RunProgress()))
    return config, prompts, given


def test_a_cache_of_another_recipe_is_refused(cached) -> None:
    config, prompts, _ = cached
    with pytest.raises(
        ConfigError, match=r"offline.cache: .* was made with other settings: prompts \(there 'digest', here 'o"
    ):
        offline.known_responses(config, prompts, "other")
    file = offline.cache_file(config)
    other = replace(offline.response_recipe(config, "digest"), max_new_tokens=99)
    with pytest.raises(ConfigError, match=r"max_new_tokens \(there 12, here 99\); remove it"):
        offline.read_responses(file, other)
    file.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="is no file of teacher responses from opdlm"):
        offline.known_responses(config, prompts, "digest")


def test_a_cache_of_another_number_format_is_refused(cached) -> None:
    config, _, _ = cached
    file, made_of = offline.cache_file(config), offline.response_recipe(config, "digest")
    other = config.model_copy(update={"teacher": config.teacher.model_copy(update={"dtype": "float32"})})
    with pytest.raises(ConfigError, match=r"dtype \(there 'bfloat16', here 'float32'\)"):
        offline.read_responses(file, offline.response_recipe(other, "digest"))
    assert offline.response_recipe(other, "digest").digest != made_of.digest


def test_caches_of_earlier_versions_are_read(cached, tmp_path) -> None:
    """They do not say the number format, and have lists with 32-bit offsets."""
    config, _, given = cached
    table, made_of = pq.read_table(offline.cache_file(config)), offline.response_recipe(config, "digest")
    recipe = {name: value for name, value in asdict(made_of).items() if name != "dtype"}
    old = table.set_column(2, "response_ids", table.column("response_ids").cast(pa.list_(pa.int32())))
    pq.write_table(
        old.replace_schema_metadata({b"opdlm": json.dumps({"recipe": recipe, "forward_tokens": 7})}),
        tmp_path / "old.parquet",
    )
    again = offline.read_responses(tmp_path / "old.parquet", made_of)
    assert {k: v.tolist() for k, v in again.by_prompt.items()} == {k: v.tolist() for k, v in given.by_prompt.items()}
    pq.write_table(old.set_column(2, "response_ids", [["x"] * len(old)]), tmp_path / "old.parquet")
    with pytest.raises(ConfigError, match="is no file of teacher responses from opdlm: the column response_ids holds"):
        offline.read_responses(tmp_path / "old.parquet", made_of)


def test_generation_retries_and_keeps_the_chunks_that_are_answered(cached, tmp_path) -> None:
    config, prompts, expected = cached
    config = config.model_copy(
        update={"offline": config.offline.model_copy(update={"cache": str(tmp_path / "again.parquet")})}
    )
    made_of = offline.response_recipe(config, "digest")

    def run(teachers: Teachers):
        return asyncio.run(offline.generate_responses(config, prompts, teachers, made_of, RunProgress()))

    with pytest.raises(
        OpdlmError, match=r"the first is p4\) failed 3 times .resources.sample_attempts.: out of memory"
    ):
        run(Teachers(fail_at=(2, 3, 4)))  # the second chunk of four, three times
    assert not offline.cache_file(config).exists()
    second = Teachers(fail_at=(1,))
    given = run(second)
    assert second.calls == 2, "the first chunk was kept; the second failed once more and was asked again"
    assert {k: v.tolist() for k, v in given.by_prompt.items()} == {k: v.tolist() for k, v in expected.by_prompt.items()}
    assert [f.name for f in tmp_path.glob("*again*")] == ["again.parquet"]
    assert not list(tmp_path.glob(".again*"))


def test_a_full_object_store_uses_up_no_attempts(cached, tmp_path, monkeypatch) -> None:
    """The answers of other calls leave the store by and by. Only a store that stays full ends the run."""
    config, prompts, expected = cached
    full = RayTaskError("generate", "Traceback ...", OutOfDiskError("Local disk is full"))
    made_of = offline.response_recipe(config, "digest")

    def run(name: str, seconds: float, fail_at: tuple[int, ...]):
        monkeypatch.setattr(offline, "StoreWait", lambda _: StoreWait(seconds, first_seconds=0.001))
        cache = config.offline.model_copy(update={"cache": str(tmp_path / name)})
        return asyncio.run(
            offline.generate_responses(
                config.model_copy(update={"offline": cache}), prompts, Teachers(fail_at, full), made_of, RunProgress()
            )
        )

    given = run("patient.parquet", 60.0, tuple(range(2, 9)))
    assert {k: v.tolist() for k, v in given.by_prompt.items()} == {k: v.tolist() for k, v in expected.by_prompt.items()}
    with pytest.raises(OpdlmError, match=r"Ray's object store and its disk were full for 0.02 s"):
        run("impatient.parquet", 0.02, tuple(range(2, 10**5)))


def test_ends_inside_a_response_are_counted() -> None:
    inner, plain = np.array([4, EOS, 5, EOS]), np.array([4, 5, EOS])
    assert offline.GivenResponses({"a": inner, "b": plain}, 0, False).cut_at_inner_end([EOS]) == 1


def test_other_weights_have_another_fingerprint(tmp_path) -> None:
    one, two = (save_teacher(tmp_path / str(seed), seed) for seed in (0, 1))
    assert weights_fingerprint(one) != weights_fingerprint(two)
    assert weights_fingerprint(one) == weights_fingerprint(save_teacher(tmp_path / "again", 0))


def test_sampling_at_a_temperature_is_seeded() -> None:
    model, prompts = tiny_model(), [request(4, i).prompt_ids for i in range(4)]

    def drawn(seed: int, temperature: float = 1.0) -> list[list[int]]:
        return [r.tolist() for r in generate(model, prompts, 10, [EOS], 4, temperature, seed)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, 0.0) == drawn(2, 0.0)


def test_generation_settings_in_the_folder_do_not_change_the_teachers_responses() -> None:
    model, prompts = tiny_model(), [request(4, i).prompt_ids for i in range(8)]
    plain = [r.tolist() for r in generate(model, prompts, 10, [EOS], 8)]
    model.generation_config.repetition_penalty = 1.9
    model.generation_config.no_repeat_ngram_size = 1
    assert [r.tolist() for r in generate(model, prompts, 10, [EOS], 8)] == plain
    assert model.generation_config.repetition_penalty == 1.9, "the model itself is left as it was"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"objective": {"kind": "cft", "selection": "all_states"}},
            "objective.selection: found 'all_states' with objective.kind 'cft', whose given responses have no",
        ),
        ({"objective": {"kind": "cft", "divergence": "jsd"}}, "objective: `cft` is a cross-entropy; found divergence"),
        (
            {"objective": {"kind": "off_policy_kd"}, "offline": {"responses": "data"}},
            "offline.responses: found `data`, but data.response_field names no column",
        ),
        (
            {"data": {"task": "chain", "prompts": 4, "chat_template": True}},
            "data.chat_template: found true with data.task; built-in tasks have no chat form",
        ),
        ({"data": {"path": "p", "thinking": True}}, "data.thinking: found True without data.chat_template"),
    ],
)
def test_contradictions_are_named(sections, message) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**sections)
