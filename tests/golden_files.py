"""Reads the reference files of tests/golden: `train/`, `shift/` (`*.json` + `.safetensors`), `decode/`, `models/`.

tests/golden/README.md describes them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.types import HiddenTargets, ScoredTrajectory, Trajectory

ROOT = Path(os.environ.get("OPDLM_GOLDEN") or Path(__file__).parent / "golden")


def cases(kind: str) -> list[Path]:
    """All reference files of `train`, `shift` or `decode`. An empty folder is an error: tests would check nothing."""
    found = sorted((ROOT / kind).glob("*.json"))
    assert found, f"no reference files in {ROOT / kind}"
    return found


def load(path: Path) -> dict[str, Any]:
    """Reads one reference file."""
    return json.loads(path.read_text())


def objective_of(case: dict[str, Any]) -> ObjectiveConfig:
    """The objective of a case, as the config section."""
    return ObjectiveConfig(**case["objective"])


def form_of(case: dict[str, Any]) -> StudentForm:
    """The student's form of a case; the paper's where the file does not name one."""
    return PAPER_FORM.replaced(case.get("logit_shift"), case.get("context"))


def trajectory_of(row: dict[str, Any], case: dict[str, Any], index: int = 0) -> Trajectory:
    """The trajectory that a reference row was made from. Its response ends with the first end-of-sequence token."""
    response = np.array(row["response_ids"], dtype=np.int32)
    stops = np.flatnonzero(response == case["eos_id"])
    return Trajectory(
        index=index,
        prompt_id=str(row["sample"]),
        prompt_ids=np.array(row["prompt_ids"], dtype=np.int32),
        response_ids=response,
        reveal_step=np.array(row["reveal_step"], dtype=np.int32),
        response_length=int(stops[0]) + 1 if stops.size else len(response),
        weight_version=0,
        finish_reason="eos" if stops.size else "length",
        denoising_steps=max(row["reveal_step"]),
    )


def unscored(trajectory: Trajectory) -> ScoredTrajectory:
    """A trajectory with targets of zeros, for tests that do not use the targets."""
    return ScoredTrajectory(trajectory, HiddenTargets(np.zeros((trajectory.response_length, 1), np.float32)))
