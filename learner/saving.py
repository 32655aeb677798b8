"""What rank 0 writes for all of them: whatever becomes of it, every rank goes on or ends alike.

The state is gathered before a byte is written, so a rank never waits in a collective call for one whose disk is full.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from opdlm.common.checkpoint import latest_checkpoint, save_checkpoint
from opdlm.common.errors import OpdlmError
from opdlm.learner import zero

log = logging.getLogger("opdlm.saving")

DISK_ERRORS = (OSError, SafetensorError)
"""What a full or broken disk raises; safetensors has an error of its own for it."""


class GiveUp(OpdlmError):
    """The end of the run. Every rank raises it, and a restart of the group would only come to the same."""


def problem_of_first_rank(act: Callable[[], object], device: torch.device | str = "cpu") -> str | None:
    """Runs `act` on every rank, of which only the first may write; a collective call, behind those that `act` makes.

    Args:
        device: where the process group's tensors live.

    Returns: None, or on every rank why the first one's disk did not take it. Other errors are raised.
    """
    problem = None
    try:
        act()
    except DISK_ERRORS as error:
        if dist.get_rank() != 0:
            raise
        cause = getattr(error, "cause", None) or error  # of an error in a Ray task
        problem = " ".join(str(cause).split()) or type(cause).__name__
    failed = torch.tensor([problem is not None], dtype=torch.int32, device=device)
    dist.broadcast(failed, 0)
    return (problem or "see rank 0") if failed.item() else None


class Saver:
    """Writes the group's checkpoints.

    Args:
        root: folder of the checkpoints.
        keep: newest ones that stay.
        max_failed: saves in a row that may fail; one more, or a failed last one, is the end of the run.
    """

    def __init__(self, engine: Any, root: Path, keep: int, max_failed: int) -> None:
        self.engine, self.root, self.keep, self.max_failed = engine, root, keep, max_failed
        self.failed_in_a_row = 0

    def save(self, state: dict[str, Any]) -> str | None:
        """Writes a checkpoint; a collective call. None, or on every rank why not; earlier checkpoints are untouched."""
        held = zero.gather_state(self.engine, keep=dist.get_rank() == 0)

        def write() -> None:
            if held is not None:
                save_checkpoint(self.root, state, held.write, self.keep)

        problem = problem_of_first_rank(write, self.engine.device)
        self.failed_in_a_row = self.failed_in_a_row + 1 if problem else 0
        if problem is None or held is None:
            return problem
        problem = f"{problem} ({held.nbytes / 1e6:,.1f} MB to write, {free_space(self.root)})"
        log.warning("checkpoint of round %d, failed save %d: %s", state["rounds"], self.failed_in_a_row, problem)
        return problem

    def end_if_due(self, problem: str, rounds: int, last: bool) -> None:
        """After a failed save, on all ranks: goes on, or ends the run on all of them.

        Args:
            last: nothing will be trained after this, so nothing saved either.

        Raises:
            GiveUp: the save was the last of the run, or one too many failed in a row.
        """
        if not last and self.failed_in_a_row <= self.max_failed:
            return
        in_a_row = f"{self.failed_in_a_row} in a row, checkpoint.max_failed_saves {self.max_failed}"
        why = "the run's last" if last else in_a_row
        raise GiveUp(f"the checkpoint of round {rounds} was not written ({why}): {self._advice(problem)}")

    def require(self, what: str, act: Callable[[], object]) -> None:
        """`problem_of_first_rank` for what a run must not lack.

        Raises:
            GiveUp: the disk did not take it.
        """
        if problem := problem_of_first_rank(act, self.engine.device):
            raise GiveUp(f"{what} could not be written: {self._advice(problem)}")

    def _advice(self, problem: str) -> str:
        there = newest(self.root) if dist.get_rank() == 0 else "see rank 0"
        return f"{problem}; {there}; make room and go on with --resume"


def newest(root: Path) -> str:
    """The newest whole checkpoint, in words for an error."""
    try:
        found = latest_checkpoint(root)
    except (OSError, OpdlmError) as error:
        return str(error)
    return f"the newest whole checkpoint is {found.folder}" if found else f"there is no checkpoint in {root}"


def free_space(folder: Path) -> str:
    """Free space on a folder's disk, in words for an error."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        return f"{shutil.disk_usage(there).free / 1e6:,.1f} MB free"
    except OSError as error:
        return f"free space unknown: {error}"
