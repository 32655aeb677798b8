"""`opdlm plan`: its figures, and the command as a user sees it. `pytest tests/deploy/run/test_plan.py`"""

from __future__ import annotations

import json

from rich.console import Console

from opdlm.common.config import load_config
from opdlm.deploy.cluster.node_memory import shares
from opdlm.deploy.run.plan import make_plan, show_plan, warnings_of_joined
from opdlm.deploy.run.preflight import preflight
from tests.deploy.cli.test_cli import opdlm, run_file  # noqa: F401  (a fixture)


def test_the_command_prints_and_writes_the_same(run_file, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # a cluster of other tests
    text = opdlm("plan", run_file, "--set", "rollout.actors=3", "--set", "learner.workers=2")
    assert "samples" in text
    assert "nothing was started; the run directory" in text
    assert "rollout 3 1 0 3 0" in text
    assert "sum 6 0" in text
    assert "memory of one learner process, in its own memory (no GPU)" in text
    assert "host memory of all processes, were they on one node" in text
    assert "in Ray's object store" in text
    assert not (tmp_path / "run").exists()

    text = opdlm("plan", run_file, "--json", tmp_path / "plan.json")
    assert "written: " in text
    plain = json.loads((tmp_path / "plan.json").read_text())
    assert plain["resources"]["CPU"]["total"] == 3
    assert [memory["role"] for memory in plain["memory"]] == ["rollout", "teacher", "learner"]
    for memory in plain["memory"]:
        assert memory["device_bytes"] == sum(term["nbytes"] for term in memory["terms"] if not term["on_host"])
    assert plain["run"]["samples"] == "100 in 1 rounds of 128"
    assert plain["node"]["bytes"] == sum(t["nbytes"] for part in ("processes", "store") for t in plain["node"][part])
    assert plain["warnings"] == []
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_what_does_not_fit_is_said_by_plan_and_dry_run(run_file, tmp_path) -> None:  # noqa: F811
    machines = "resources.machines={nodes: 2, gpus: 1, gpu_gib: 0.1, memory_gib: 4, object_store_gib: 0.00001}"
    settings = ["--set", machines, "--set", "rollout.gpus_per_actor=1", "--set", "learner.workers=2"]
    for command in (["plan"], ["train", "--dry-run"]):
        text = " ".join(opdlm(*command, run_file, *settings).split())
        assert "host memory of one of 2 nodes, at most" in text
        assert "may not fit: rollout: a process needs up to 0.5" in text
        assert "of a GPU; a machine of resources.machines has 0.10: lower rollout.cache_tokens, " in text
        assert "may not fit: a node needs up to 5." in text
        assert "of host memory; a machine of resources.machines has 4.00: put fewer processes on a node" in text
        assert (
            "of Ray's object store; a machine of resources.machines has 0.00, and Ray writes the rest to disk" in text
        )
    text = opdlm("plan", run_file, "--set", "resources.machines.gpus=1", code=2)
    assert "resources.machines.memory_gib: missing; it has no default" in text
    text = opdlm("plan", run_file, "--set", "resources.machines.memory_gib=0", code=2)
    assert "resources.machines.memory_gib: input should be greater than 0; found 0" in text


def test_a_run_is_compared_with_the_nodes_that_it_has_joined(run_file) -> None:  # noqa: F811
    checked = preflight(load_config(run_file))
    assert (
        warnings_of_joined(checked, [{"Alive": True, "Resources": {"memory": 1e12, "object_store_memory": 1e12}}]) == []
    )
    small = {"Alive": True, "Resources": {"memory": 2**30, "object_store_memory": 2**10}}
    host, store = warnings_of_joined(checked, [small])
    assert "GiB of host memory; a node of the cluster has 1.00" in host
    assert "GiB of Ray's object store; a node of the cluster has 0.00" in store


def test_mistakes_are_named(run_file, tmp_path) -> None:  # noqa: F811
    assert "does not exist; give a YAML" in opdlm("plan", tmp_path / "no.yaml", code=2)
    text = opdlm("plan", run_file, "--json", tmp_path / "none" / "plan.json", code=2)
    assert "--json:" in text
    assert "which does not exist" in text
    assert "memory of one" not in text
    assert "model folder /no does not exist" in opdlm("plan", run_file, "--set", "model.teacher=/no", code=2)


def test_the_plan_counts_the_longest_sequence_and_the_mask_tokens_row(run_file) -> None:  # noqa: F811
    plan = make_plan(load_config(run_file, ["evaluation.final_problems=0", "teacher.dtype=bfloat16"]))
    student, teacher = (next(t.nbytes for t in plan.memory[i].terms if t.what == "weights") for i in (0, 1))
    # float32 against bfloat16, and the mask token's row of 16 in embedding and output matrix
    assert student == 2 * teacher + 2 * 16 * 4
    cache = next(t.nbytes for t in plan.memory[0].terms if t.what == "key/value cache")
    columns, rest = divmod(cache, 64 * 2 * 2 * 8 * 4)  # 64 slots, 2 layers, keys and values, 1 head of 8, float32
    longest = max(len(prompt.ids) for prompt in preflight(load_config(run_file)).prompts.prompts)
    end = -(-(longest + 20) // 4) * 4  # 20 new tokens, to the end of a block of 4
    assert (columns, rest) == (end, 0)


def test_the_plan_shows_a_bounded_cache_and_refuses_one_that_is_too_small(run_file) -> None:  # noqa: F811
    assert "500 + 16 positions" in opdlm("plan", run_file, "--set", "rollout.cache_tokens=500")
    for evaluated, who in ((0, "chain/"), (1000, "chain/test/")):
        more = ("--set", f"evaluation.final_problems={evaluated}")
        text = opdlm("plan", run_file, *more, "--set", "rollout.cache_tokens=20", code=2)
        assert f"rollout.cache_tokens: found 20, too small for {who}" in text
        assert f"and at most {64 if evaluated else 20} new ones take" in text
        least = text.split("give at least ")[1].split()[0]
        assert f"{least} + 16 positions" in opdlm("plan", run_file, *more, "--set", f"rollout.cache_tokens={least}")


def test_roles_that_share_a_gpu_are_summed(run_file) -> None:  # noqa: F811
    parts = ["rollout.gpus_per_actor=0.4", "teacher.gpus_per_actor=0.2", "learner.gpus_per_worker=0.4"]
    plan = make_plan(load_config(run_file, parts))
    total = sum(memory.device_bytes for memory in plan.memory)
    ((words, nbytes),) = shares(plan.memory, plan.demands)
    assert words.startswith("all share one GPU: 1 x ")
    assert f"= {total / 2**30:.2f} GiB" in words
    assert nbytes == total
    plan = make_plan(load_config(run_file, ["rollout.actors=4", "rollout.gpus_per_actor=0.5"]))
    assert shares(plan.memory, plan.demands)[0][0].startswith("rollout: up to 2 on one GPU")


def test_everything_fits_100_columns(run_file, tmp_path) -> None:  # noqa: F811
    with (tmp_path / "out").open("w") as stream:
        show_plan(load_config(run_file), Console(file=stream, width=180))
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines
    assert max(map(len, lines)) <= 100


def test_the_plan_shows_each_source_and_its_share(run_file, tmp_path) -> None:  # noqa: F811
    for name, count in (("sums", 6), ("rest", 8)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(count)))
    sources = f"[{{path: {tmp_path}/sums.jsonl, weight: 2}}, {{path: {tmp_path}/rest.jsonl, weight: 0.5}}]"
    more = ("--set", "data.task=null", "--set", "data.prompts=null", "--set", f"data.sources={sources}")
    text = opdlm("plan", run_file, *more, "--json", tmp_path / "plan.json")
    assert "6 prompts, weight 2: 12 samples an epoch (75.0%)" in text
    run = json.loads((tmp_path / "plan.json").read_text())["run"]
    assert run["source rest"] == "8 prompts, weight 0.5: 4 samples an epoch (25.0%)"
    assert run["prompts"] == "14 kept, 0 refused"
    assert run["samples"].startswith("16 in 1 rounds")
    missing = sources.replace("rest.jsonl", "no.jsonl")
    text = opdlm("train", run_file, "--dry-run", *more[:-1], f"data.sources={missing}", code=2)
    assert f"data.sources[1].path: {tmp_path}/no.jsonl does not exist" in text


def rows(*arguments: object) -> str:
    """What a command prints, without the borders of its tables and without its line ends."""
    return " ".join(opdlm(*arguments).replace("│", " ").split())


def test_the_plan_says_what_is_known_of_time_and_gpu_hours(run_file, tmp_path) -> None:  # noqa: F811
    gpus = ["--set", "rollout.gpus_per_actor=1", "--set", "learner.gpus_per_worker=1", "--set", "run.rounds=10"]
    text = rows("plan", run_file, *gpus)
    assert "time left not known before the first round; the run shows it then" in text
    assert "GPU-hours 2 for each hour" in text
    text = rows("plan", run_file, *gpus, "--set", "run.max_minutes=90")
    assert "part ends after the round in which 90 minutes are over; --resume goes on" in text
    assert "GPU-hours 2 for each hour, about 3.0 in a part" in text
    assert "GPU-hours" not in opdlm("plan", run_file)
    (tmp_path / "run").mkdir()
    records = [{"kind": "data", "round": 0, "wall_seconds": 0}]
    records += [{"kind": "round", "round": r, "wall_seconds": 1800 * r, "gpu_hours": float(r)} for r in (1, 2)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = rows("plan", run_file, *gpus)
    assert "time left about 4 h 00 min, as the 2 rounds so far took" in text
    assert "GPU-hours 2.0 spent, about 10.0 at the end" in text


def test_a_figure_that_the_evaluations_do_not_have_is_refused_by_plan_and_train(run_file) -> None:  # noqa: F811
    best = ["--set", "checkpoint.keep_best.figure=accuracy", "--set", "evaluation.every_rounds=1"]
    for command in (["plan"], ["train", "--dry-run"], ["train"]):
        text = opdlm(*command, run_file, *best, code=2)
        assert "checkpoint.keep_best.figure: found 'accuracy'; this run's evaluations have exact_match," in text


def test_the_minutes_of_the_command_line_are_a_setting(run_file) -> None:  # noqa: F811
    text = rows("train", run_file, "--dry-run", "--minutes", "110")
    assert "in which 110 minutes are over" in text
    text = opdlm("train", run_file, "--dry-run", "--minutes", "0", code=2)
    assert "run.max_minutes: input should be greater than 0" in text
    twice = opdlm("train", run_file, "--dry-run", "--minutes", "9", "--set", "run.max_minutes=8", code=2)
    assert "--set run.max_minutes: it is given twice" in twice
