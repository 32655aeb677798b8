"""`opdlm compare`: objectives side by side, under one budget of prompts and one list of seeds.

Each (objective, seed) is a run of its own in OUT/OBJECTIVE-seedN, made by `opdlm train`. A finished run is not
repeated, and a stopped one is resumed. Runs of one seed share the teacher's responses, whose compute counts for each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.common.errors import OpdlmError
from opdlm.common.files import check_folder
from opdlm.deploy.observe.comparison import write_comparison
from opdlm.deploy.observe.curves import write_curves
from opdlm.deploy.observe.report import DYNAMIC, STATIC
from opdlm.deploy.run.directory import check_run, check_same_config, held_config
from opdlm.deploy.run.lock import RunLock, check_unlocked
from opdlm.deploy.run.paths import absolute_paths, local_models
from opdlm.deploy.run.preflight import preflight
from opdlm.deploy.run.train import train

OBJECTIVES: dict[str, dict[str, Any]] = {
    "opd": {"kind": "opd", "selection": None},
    "opd_random_mask": {"kind": "opd", "selection": "random_mask"},
    "off_policy_kd": {"kind": "off_policy_kd", "selection": None},
    "cft": {
        "kind": "cft",
        "selection": None,
        "divergence": "kl",
        "reverse_weight": 0.0,
        "top_k": 0,
        "tail": "drop",
        "teacher_temperature": 1.0,
    },
}
"""What each objective sets; the run file decides everything else. `opd_random_mask` is the paper's OPDLM-off."""


def run_comparison(
    base: OpdlmConfig, objectives: Sequence[str], seeds: Sequence[int], out: Path, console: Console
) -> int:
    """Makes the runs that are missing and writes the comparison; returns an exit code (128 + signal after a stop).

    Raises:
        OpdlmError: an unknown objective, one or a seed that is given twice, another process that works in `out`, or a
            config or directory that one of the runs would refuse; before any run starts.
    """
    for name in objectives:
        if name not in OBJECTIVES:
            raise OpdlmError(f"--objectives: found {name!r}; known: {', '.join(OBJECTIVES)}")
    for option, given in (("--objectives", objectives), ("--seeds", seeds)):
        if len(set(given)) < len(given):
            found = ",".join(str(each) for each in given)
            raise OpdlmError(f"{option}: found {found}; a run counts once, so give each of them once")
    evaluates = base.evaluation.final_problems and (base.data.task or base.evaluation.data)
    if not evaluates or base.run.replay is not None:
        raise OpdlmError(
            "compare: needs prompts of a task (data.task) or questions of your own (evaluation.data), a final "
            "evaluation (evaluation.final_problems), and no run.replay"
        )
    if base.data.task and base.evaluation.tasks and not set(_trained(base)) & set(base.evaluation.tasks):
        raise OpdlmError(
            f"evaluation.tasks: found {base.evaluation.tasks}, none of data.task {base.data.task}; add them"
        )
    runs = [(name, seed, local_models(_config(base, name, seed, out))) for seed in seeds for name in objectives]
    check_folder(out, "--out")
    check_unlocked(out)
    for _, _, config in runs:
        if not _is_done(root := Path(config.run.dir)):
            check_run(absolute_paths(config), resume=(root / "config.yaml").exists())
        preflight(config)
    with RunLock(out):
        stopped = _make_runs(runs, console)
        return _write_results(runs, out, base, console) if stopped is None else stopped


def _make_runs(runs: Sequence[tuple[str, int, OpdlmConfig]], console: Console) -> int | None:
    """Makes the runs that are not done; returns None, or the exit code of a run that has stopped before its end."""
    for number, (name, seed, config) in enumerate(runs, start=1):
        root = Path(config.run.dir)
        if (root / "config.yaml").exists():
            check_same_config(held_config(root), absolute_paths(config).model_dump(mode="json"), root)
        if _is_done(root):
            console.print(f"[{number}/{len(runs)}] {name}, seed {seed}: done before", highlight=False)
            continue
        console.print(f"[{number}/{len(runs)}] {name}, seed {seed}: {root}", highlight=False)
        code = train(config, resume=(root / "config.yaml").exists(), console=console)
        if code or not _is_done(root):  # `run.max_minutes` ends a run with code 0
            return code
    return None


def _write_results(runs: Sequence[tuple[str, int, OpdlmConfig]], out: Path, base: OpdlmConfig, console: Console) -> int:
    folders, written = [(name, seed, Path(config.run.dir)) for name, seed, config in runs], []
    if base.data.task:
        for table in write_comparison(out, folders, _trained(base)):
            console.print(table, "")
        written += ["compare.json", "compare.png", "retention.png"]
    if base.evaluation.data:
        console.print(write_curves([folder for *_, folder in folders], out / "curves.png", {}), "")
        written += ["curves.json", "curves.png"]
    console.print(f"written: {out}/{', '.join(written)}", highlight=False, soft_wrap=True)
    return 0


def _config(base: OpdlmConfig, name: str, seed: int, out: Path) -> OpdlmConfig:
    raw = base.model_dump(mode="json")
    raw["run"] |= {"seed": seed, "dir": str(out / f"{name}-seed{seed}")}
    raw["objective"] |= OBJECTIVES[name]
    raw["evaluation"]["tasks"] = base.evaluation.tasks or _trained(base)
    raw["offline"] |= {"cache": str(out / f"teacher-responses-seed{seed}.parquet")}
    return config_from_dict(raw)


def _trained(base: OpdlmConfig) -> list[str]:
    return base.data.task.split("+") if base.data.task else []


def _is_done(root: Path) -> bool:
    """Whether a run has its last evaluations; the report of a stopped run has none."""
    file = root / "report.json"
    return file.exists() and {STATIC, DYNAMIC} <= json.loads(file.read_text())["by_task"].keys()
