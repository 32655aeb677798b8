"""Kept rollouts and runs that replay them. `pytest tests/system/test_replay.py`"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import ConfigError
from opdlm.common.model.shards import weights_fingerprint
from opdlm.deploy.cluster.placement import demands
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.run.preflight import preflight
from opdlm.deploy.run.train import train
from opdlm.learner.rollout_files import RolloutFacts, load_samples, round_file, save_round
from tests.system.runs import ROUNDS, losses, run_config
from tests.tiny import scored


@pytest.mark.ray
def test_replay_gives_the_losses_of_the_live_run(whole, chain_teacher, tmp_path) -> None:
    """They are equal to the bit. Where a round is missing, nothing starts."""
    from ray.util import list_named_actors

    def configured(name: str, rollouts: Path, **sections) -> OpdlmConfig:
        return run_config(chain_teacher, tmp_path / name, run={"replay": str(rollouts)}, **sections)

    saved = whole / "rollouts"
    files = sorted(saved.iterdir())
    assert [f.name for f in files] == [f"round-{r:06d}.safetensors" for r in range(ROUNDS)]
    indices = [s.trajectory.index for r, f in enumerate(files) for s in load_samples(f, range(8 * r, 8 * r + 8))]
    assert indices == list(range(8 * ROUNDS))

    text = io.StringIO()
    again = configured("again", saved, rollout={"gpus_per_actor": 1, "actors": 7})
    assert train(again, resume=False, console=Console(file=text, width=200)) == 0
    assert losses(tmp_path / "again") == losses(whole)
    assert "replay: no rollout and no teacher actors, so no evaluation" in text.getvalue()
    records = read_records(tmp_path / "again")
    assert "evaluation" not in {r["kind"] for r in records}
    assert all(r["staleness_max"] == 0 for r in records if r["kind"] == "round")
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "again", whole)]
    assert reports[0]["rollout_tokens"] == reports[1]["rollout_tokens"]
    students = [(folder / "student" / "model.safetensors").read_bytes() for folder in (tmp_path / "again", whole)]
    assert students[0] == students[1]

    incomplete = tmp_path / "incomplete"
    shutil.copytree(saved, incomplete)
    (incomplete / files[1].name).unlink()
    before = list_named_actors(all_namespaces=True)
    message = rf"lacks 1 of the run's {ROUNDS} rounds, the first is round-000001.safetensors"
    with pytest.raises(ConfigError, match=message):
        train(configured("never", incomplete), resume=False, console=Console(quiet=True))
    assert not (tmp_path / "never").exists()
    assert list_named_actors(all_namespaces=True) == before


@pytest.fixture
def kept_rollouts(tmp_path, chain_teacher):
    """Rollouts of two rounds such as `run_config` keeps: (a function that writes those of one round, their folder)."""
    folder = tmp_path / "rollouts"
    config = run_config(chain_teacher, tmp_path / "run", run={"rounds": 2})
    teacher = f"{weights_fingerprint(chain_teacher)} float32"
    facts = RolloutFacts(8, 4, "absolute", 17, "hidden", preflight(config).order.digest, teacher)

    def write_round(
        round_: int, count: int = 8, width: int = 16, version: int | None = None, given: bool = False, **changed
    ) -> None:
        samples = [scored(8 * round_ + i, "hidden", 0) for i in range(count)]
        for sample in samples:
            object.__setattr__(sample.trajectory, "weight_version", round_ if version is None else version)
            object.__setattr__(sample.trajectory, "denoising_steps", 0 if given else 4)
            object.__setattr__(sample.targets, "hidden", sample.targets.hidden[:, :1].repeat(width, axis=1))
        fields = {name: getattr(facts, name) for name in RolloutFacts.__slots__}
        save_round(round_file(folder, round_), samples, RolloutFacts(**fields | changed))

    write_round(0)
    write_round(1)
    return write_round, folder


def test_settings_that_must_agree_with_kept_rollouts_are_checked_and_no_others(
    kept_rollouts, chain_teacher, tmp_path
) -> None:
    write_round, folder = kept_rollouts

    def check(targets="hidden", **sections) -> None:
        run = {"rounds": 2, "replay": str(folder)} | sections.pop("run", {})
        config = run_config(chain_teacher, tmp_path / "run", run=run, **sections)
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"targets": targets})})
        assert {role for rows in demands(config).values() for role, _, _ in rows} == {"learner"}
        preflight(config)

    check()
    check(objective={"divergence": "jsd", "selection": "random_mask"}, learner={"workers": 1, "batch_size": 8})
    check(run={"rounds": 1}, rollout={"max_new_tokens": 9, "strategy": "random", "actors": 9})

    def refused(message: str, **sections) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            check(**sections)
        assert "\n" not in str(caught.value)

    refused("lacks 1 of the run's 3 rounds, .* run.rounds 2 would do", run={"rounds": 3})
    refused("rollout.prompts_per_round was 8, is now 4", run={"rounds": 1}, rollout={"prompts_per_round": 4})
    refused("rollout.block_size was 4, is now 2", rollout={"block_size": 2})
    refused("rollout.block_grid was 'absolute', is now 'response'", rollout={"block_grid": "response"})
    refused("teacher.targets was 'hidden', is now 'logits'", targets="logits")
    refused(r"data \(fingerprint of the prompts\) was", data={"prompts": 19})
    refused("run.dump_rollouts: found with run.replay", run={"dump_rollouts": True})
    refused("holds no round-000000.safetensors; did you mean .*/rollouts?", run={"replay": str(tmp_path)})
    refused("expected RUN/rollouts of a run with --dump-rollouts", run={"replay": str(chain_teacher)})
    write_round(1, version=0)
    refused("queue.max_staleness: found 0, but samples in .*round-000001.* are 1 rounds older")
    check(queue={"max_staleness": 1})
    write_round(1, given=True)
    refused("objective.selection: found 'one_state_per_block', but the responses in .*round-000001.* were given")
    check(objective={"selection": "random_mask"})
    write_round(1, count=7)
    refused(r"lacks 1 of the round's 8 samples \(the first is 15\)")
    write_round(1, width=12)
    refused("model.teacher: its hidden states have 16 numbers, those in .* 12")
    write_round(1, teacher="other float32")
    refused(r"model.teacher \(fingerprint and teacher.dtype\) was 'other float32', is now")
    write_round(1)
    refused("teacher.targets was 'hidden', is now 'tokens'", objective={"kind": "cft"})
    write_round(1, vocab_size=32)
    refused(r"model.teacher \(its vocabulary\) was 32, is now 17")
    shutil.rmtree(folder)
    refused("holds no round-000000.safetensors")
