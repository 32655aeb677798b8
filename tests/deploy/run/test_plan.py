"""`opdlm plan`: the balance of roles by hand, and the command as a user meets it. `pytest tests/deploy/run/test_plan.py`"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from opdlm.common.config import OpdlmConfig, config_from_dict, load_config
from opdlm.deploy.run.balance import balances, read_rates
from opdlm.deploy.run.plan import make_plan, sharing, show_plan
from opdlm.deploy.run.preflight import preflight
from tests.deploy.cli.test_cli import opdlm, run_file  # noqa: F401  (a fixture)


def config_with(**sections) -> OpdlmConfig:
    return config_from_dict({"model": {"teacher": "t"}, "data": {"task": "chain", "prompts": 9}} | sections)


@pytest.fixture
def measured(tmp_path) -> Path:
    """Three rounds of 10 prompts with 40 tokens each; one learner of two ranks."""
    folder = tmp_path / "measured"
    folder.mkdir()
    config = config_with(
        rollout={"prompts_per_round": 10, "batch_size": 8}, learner={"workers": 2, "batch_size": 10}
    ).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rounds = [
        {
            "kind": "round",
            "round": n + 1,
            "round_tokens": 400,
            "rollout_tokens_per_second": rate,
            "teacher_tokens_per_second": 10 * rate,
            "learner_tokens_per_second": 8 * rate,
            "weight_push_seconds": 0.5,
        }
        for n, rate in enumerate((5.0, 100.0, 50.0))  # the first is slow: things are compiled
    ]
    records = [{"kind": "data", "round": 0}, *rounds, {"kind": "step", "round": 3}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_rates_are_medians(measured) -> None:
    rates = read_rates(measured)
    assert (rates.rounds, rates.rollout, rates.teacher, rates.learner) == (3, 50.0, 500.0, 200.0)
    assert (rates.tokens_per_sample, rates.push_seconds, rates.slots) == (40.0, 0.5, 8)


def test_balance_by_hand(measured) -> None:
    """20 prompts of 40 tokens: 800 tokens. Rollout 800/50 = 16 s for one actor, teacher 800/500, learner 800/200."""
    settings = {"rollout": {"prompts_per_round": 20, "batch_size": 8}, "learner": {"workers": 1}}
    sequential = balances(config_with(**settings), read_rates(measured))
    assert [row.rollout_actors for row in sequential] == [1, 2, 4, 8]
    assert [row.rollout_seconds for row in sequential] == pytest.approx([16, 8, 4, 2.4])  # 8 actors: parts of 3
    assert [row.round_seconds for row in sequential] == pytest.approx([22.1, 14.1, 10.1, 8.5])
    assert [row.bottleneck for row in sequential] == ["rollout", "rollout", "rollout", "learner"]
    assert sequential[0].tokens_per_second == pytest.approx(800 / 22.1)
    overlapped = balances(config_with(**settings, queue={"max_staleness": 1}), read_rates(measured))
    # The push is rollout's; with many actors two rounds on the way keep no role busy all the time.
    assert [row.round_seconds for row in overlapped] == pytest.approx([16.5, 8.5, 10.1 / 2, 8.5 / 2])
    ahead = balances(config_with(**settings, queue={"max_staleness": 2}), read_rates(measured))
    assert [row.round_seconds for row in ahead] == pytest.approx([16.5, 8.5, 4.5, 4.0])
    more = config_with(rollout={"prompts_per_round": 20}, learner={"workers": 4}, teacher={"actors": 2})
    row = balances(more, read_rates(measured))[0]
    assert (row.teacher_seconds, row.learner_seconds) == pytest.approx((0.8, 1.0))


def test_rates_that_cannot_be_used_are_named(measured, run_file) -> None:  # noqa: F811
    def refused(folder: Path) -> str:
        return opdlm("plan", run_file, "--rates", folder, code=2)

    assert "--rates: /no/run/config.yaml does not exist" in refused(Path("/no/run"))
    file = measured / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines).replace('"rollout_tokens_per_second"', '"other"'))
    assert "has rollout_tokens_per_second; give a run with rollout actors" in refused(measured)
    file.write_text(lines[0] + "\n")
    assert "has no round yet" in refused(measured)
    file.write_text(lines[0] + "\n" + lines[1][:20])
    assert "line 2 is not JSON" in refused(measured)


def test_the_command_prints_and_writes_the_same(run_file, measured, tmp_path) -> None:  # noqa: F811
    text = opdlm("plan", run_file, "--set", "rollout.actors=3", "--set", "learner.workers=2")
    assert "balance: needs measured rates" in text
    assert "rollout 3 1 0 3 0" in text
    assert "sum 6 0" in text
    assert "memory of one learner process, in its own memory (no GPU)" in text
    assert not (tmp_path / "run").exists()

    text = opdlm("plan", run_file, "--rates", measured, "--json", tmp_path / "plan.json")
    assert "seconds a round of 128 prompts, from the rates of 3 rounds" in text
    assert "bottleneck: rollout; at max_staleness 0 the roles take turns" in text
    plain = json.loads((tmp_path / "plan.json").read_text())
    assert plain["resources"]["CPU"]["total"] == 3
    assert [memory["role"] for memory in plain["memory"]] == ["rollout", "teacher", "learner"]
    for memory in plain["memory"]:
        assert memory["device_bytes"] == sum(term["nbytes"] for term in memory["terms"] if not term["on_host"])
    assert plain["balance"]["rates"]["rollout"] == 50.0
    assert [row["rollout_actors"] for row in plain["balance"]["rollout_actors"]] == [1, 2, 4, 8]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_mistakes_are_named(run_file, tmp_path) -> None:  # noqa: F811
    assert "does not exist; give a YAML" in opdlm("plan", tmp_path / "no.yaml", code=2)
    text = opdlm("plan", run_file, "--json", tmp_path / "none" / "plan.json", code=2)
    assert "--json: the folder" in text
    assert "memory of one" not in text
    assert "model folder /no does not exist" in opdlm("plan", run_file, "--set", "model.teacher=/no", code=2)


def test_the_plan_knows_lengths_and_the_mask_tokens_row(run_file) -> None:  # noqa: F811
    plan = make_plan(load_config(run_file), None)
    student, teacher = (next(t.nbytes for t in plan.memory[i].terms if t.what == "weights") for i in (0, 1))
    # float32 against bfloat16, and the mask token's row of 16 in embedding and output matrix
    assert student == 2 * teacher + 2 * 16 * 4
    cache = next(t.nbytes for t in plan.memory[0].terms if t.what == "key/value cache")
    columns, rest = divmod(cache, 64 * 2 * 2 * 8 * 4)  # 64 slots, 2 layers, keys and values, 1 head of 8, float32
    longest = max(len(prompt.ids) for prompt in preflight(load_config(run_file)).prompts.prompts)
    end = -(-(longest + 20) // 4) * 4  # 20 new tokens, to the end of a block of 4
    assert (columns, rest) == (end, 0)


def test_roles_that_share_a_gpu_are_summed(run_file) -> None:  # noqa: F811
    parts = ["rollout.gpus_per_actor=0.4", "teacher.gpus_per_actor=0.2", "learner.gpus_per_worker=0.4"]
    plan = make_plan(load_config(run_file, parts), None)
    total = sum(memory.device_bytes for memory in plan.memory)
    assert sharing(plan)[0].startswith("all share one GPU: 1 x ")
    assert f"= {total / 2**30:.2f} GiB" in sharing(plan)[0]
    plan = make_plan(load_config(run_file, ["rollout.actors=4", "rollout.gpus_per_actor=0.5"]), None)
    assert sharing(plan)[0].startswith("rollout: up to 2 on one GPU")


def test_everything_fits_100_columns(run_file, measured, tmp_path) -> None:  # noqa: F811
    with (tmp_path / "out").open("w") as stream:
        show_plan(load_config(run_file), measured, None, Console(file=stream, width=180))
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines
    assert max(map(len, lines)) <= 100
