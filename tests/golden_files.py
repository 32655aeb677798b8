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
from opdlm.common.types import HiddenTargets, PolicyTargets, ScoredTrajectory, Trajectory

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
    settings = dict(case["objective"])
    assert settings.pop("kl_estimator", "k3") == "k3", "the only estimator there is"
    return ObjectiveConfig(**settings)


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


def group_trajectories(case: dict[str, Any]) -> list[tuple[ScoredTrajectory, dict[str, Any]]]:
    """The trajectories of an `rl` case, whose group is not left out, and what the file says of each."""
    found = []
    for group in case["groups"]:
        for sample in group["samples"]:
            length, kept = sample["response_length"], len(sample["response_ids"])
            trajectory = Trajectory(
                index=len(found),
                prompt_id=str(len(found)),
                prompt_ids=np.array(group["prompt_ids"], dtype=np.int32),
                response_ids=np.array(sample["response_ids"], dtype=np.int32),
                reveal_step=np.array(sample["reveal_step"], dtype=np.int32),
                response_length=length,
                weight_version=0,
                finish_reason=sample["finish_reason"],
                denoising_steps=max(sample["reveal_step"]),
                reveal_logprob=np.array(sample["old_logprobs"] + [0.0] * (kept - length), dtype=np.float32),
            )
            if not group["dropped"]:
                reference = sample.get("reference_logprobs")
                as_array = None if reference is None else np.array(reference, dtype=np.float32)
                found.append((ScoredTrajectory(trajectory, PolicyTargets(sample["advantage"], as_array)), sample))
    return found


def unscored(trajectory: Trajectory) -> ScoredTrajectory:
    """A trajectory with targets of zeros, for tests that do not use the targets."""
    return ScoredTrajectory(trajectory, HiddenTargets(np.zeros((trajectory.response_length, 1), np.float32)))
