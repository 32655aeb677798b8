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
    if not base.data.task or not base.evaluation.final_problems or base.run.replay is not None:
        raise OpdlmError(
            "compare: needs prompts of a task (data.task) and a final evaluation (evaluation.final_problems), and no "
            "run.replay"
        )
    if base.evaluation.tasks and not set(_trained(base)) & set(base.evaluation.tasks):
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
        return _run_all(runs, out, _trained(base), console)


def _run_all(runs: Sequence[tuple[str, int, OpdlmConfig]], out: Path, trained: Sequence[str], console: Console) -> int:
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
    for table in write_comparison(out, [(name, seed, Path(c.run.dir)) for name, seed, c in runs], trained):
        console.print(table, "")
    console.print(f"written: {out}/compare.json, compare.png, retention.png", highlight=False, soft_wrap=True)
    return 0


def _config(base: OpdlmConfig, name: str, seed: int, out: Path) -> OpdlmConfig:
    raw = base.model_dump(mode="json")
    raw["run"] |= {"seed": seed, "dir": str(out / f"{name}-seed{seed}")}
    raw["objective"] |= OBJECTIVES[name]
    raw["evaluation"]["tasks"] = base.evaluation.tasks or _trained(base)
    raw["offline"] |= {"cache": str(out / f"teacher-responses-seed{seed}.parquet")}
    return config_from_dict(raw)


def _trained(base: OpdlmConfig) -> list[str]:
    return str(base.data.task).split("+")


def _is_done(root: Path) -> bool:
    """Whether a run has its last evaluations; the report of a stopped run has none."""
    file = root / "report.json"
    return file.exists() and {STATIC, DYNAMIC} <= json.loads(file.read_text())["by_task"].keys()
