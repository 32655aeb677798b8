"""What rank 0 writes for the group: checkpoints, and the finished student. A full disk ends or spares all ranks alike.

The first rank writes each tensor as it is gathered, so no process holds the whole state. Where its disk is full, it
still takes part in gathering the rest, so no other rank waits for it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from opdlm.common.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint, save_checkpoint
from opdlm.common.config.schema import OpdlmConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.folder import save_student
from opdlm.common.model.load import load_model
from opdlm.common.types import WeightPack
from opdlm.common.weights import load_weights
from opdlm.learner import zero
from opdlm.learner.lora import save_adapter

log = logging.getLogger("opdlm.saving")

_DISK_ERRORS = (OSError, SafetensorError)
"""What a full or broken disk raises; safetensors has an error type of its own for it."""
_NONE, _NOTHING_WHOLE = -1, -2
"""In place of a checkpoint's rounds: there is no checkpoint, or there are only damaged ones."""


class GiveUp(OpdlmError):
    """Ends the run. Every rank raises it, for a reason that a restart of the group would not remove."""


class BehindQueue(OpdlmError):
    """Ends the group. Every rank raises it: the queue has let go of rounds that must be trained again."""


class Saver:
    """Reads and writes the group's checkpoints, and writes the finished student.

    Args:
        engine: DeepSpeed engine around a `DistillModule`.
        root: folder of the checkpoints.
        keep: how many of the newest checkpoints stay.
        max_failed: how many saves in a row may fail; one more, or a failed last save, ends the run.
    """

    def __init__(self, engine: Any, root: Path, keep: int, max_failed: int) -> None:
        self.engine, self.root, self.keep, self.max_failed = engine, root, keep, max_failed
        self.failed_in_a_row = 0

    def restore(self, committed_rounds: int) -> Checkpoint | None:
        """Loads the newest checkpoint of at most `committed_rounds` rounds into the engine. A collective call.

        A newer checkpoint than the queue knows of was written by a group that outlived its driver for a moment. This
        run's records begin before it, so it is passed over. The first rank decides for all.

        Returns: the checkpoint; None at the start of a run.

        Raises:
            BehindQueue: the checkpoint that the queue knows of is damaged or gone, and there is an older one.
            GiveUp: there is no older one.
        """
        rounds, reason = _NOTHING_WHOLE, "see rank 0"
        if dist.get_rank() == 0:
            try:
                found = latest_checkpoint(self.root, committed_rounds)
                rounds = found.rounds if found else _NONE
            except OpdlmError as error:
                reason = str(error)
        agreed = torch.tensor([rounds], dtype=torch.int64, device=self.engine.device)
        dist.broadcast(agreed, 0)
        rounds = int(agreed)
        if rounds == _NONE and committed_rounds > 0:
            raise GiveUp(
                f"the checkpoint of round {committed_rounds} in {self.root} is gone; restore it from a backup, or "
                "start in another run.dir"
            )
        if rounds == _NOTHING_WHOLE:
            raise GiveUp(reason)
        if rounds == _NONE:
            return None
        if rounds < committed_rounds:
            raise BehindQueue(
                f"the checkpoint of round {committed_rounds} in {self.root} is damaged or gone; going on from the one "
                f"of round {rounds}"
            )
        checkpoint = read_checkpoint(self.root, rounds)
        zero.load_state(self.engine, checkpoint.folder)
        return checkpoint

    def save(self, state: dict[str, Any]) -> str | None:
        """Writes a checkpoint. A collective call. Where it fails, earlier checkpoints are unchanged.

        Args:
            state: what the checkpoint says of the run, JSON-able; `rounds` names the checkpoint.

        Returns: None, or on every rank why the checkpoint was not written.
        """
        first, tensors = dist.get_rank() == 0, zero.state_tensors(self.engine)

        def write() -> None:
            try:
                if first:
                    write_files = partial(zero.write_state, self.engine, tensors)
                    save_checkpoint(self.root, state, write_files, self.keep)
            finally:
                while next(tensors, None) is not None:  # those that were not written; other ranks write none
                    continue

        problem = problem_of_first_rank(write, self.engine.device)
        self.failed_in_a_row = self.failed_in_a_row + 1 if problem else 0
        if problem is None or not first:
            return problem
        size = f"{zero.state_bytes(self.engine) / 1e6:,.1f} MB to write"
        problem = f"{problem} ({size}, {_free_space(self.root)})"
        log.warning("checkpoint of round %d, failed save %d: %s", state["rounds"], self.failed_in_a_row, problem)
        return problem

    def end_if_due(self, problem: str, rounds: int, last: bool) -> None:
        """After a failed save: ends the run on all ranks, or returns on all ranks.

        Args:
            problem: what `save` returned.
            last: the save was the run's last, after which nothing is trained or saved.

        Raises:
            GiveUp: the save was the run's last, or too many have failed in a row.
        """
        if not last and self.failed_in_a_row <= self.max_failed:
            return
        in_a_row = f"{self.failed_in_a_row} in a row, checkpoint.max_failed_saves {self.max_failed}"
        why = "the run's last" if last else in_a_row
        raise GiveUp(f"the checkpoint of round {rounds} was not written ({why}): {self._advice(problem)}")

    def require(self, what: str, act: Callable[[], object]) -> None:
        """Runs `problem_of_first_rank` for something that the run must not lack. A collective call.

        Args:
            what: names the file or folder in the error.

        Raises:
            GiveUp: the first rank's disk did not take it.
        """
        if problem := problem_of_first_rank(act, self.engine.device):
            raise GiveUp(f"{what} could not be written: {self._advice(problem)}")

    def export_student(self, run_dir: Path, start: str, config: OpdlmConfig, pack: WeightPack | None) -> None:
        """Writes the finished student as a Hugging Face folder, `RUN/student`, and a trained adapter, `RUN/adapter`.

        Adapters on noisy tokens alone are in the student's folder.

        A collective call. A folder that an earlier start of the group has written stays as it is.

        Args:
            start: folder of the student's start weights.
            config: the run's.
            pack: the last published weights on rank 0, None on the other ranks.

        Raises:
            GiveUp: the first rank's disk did not take it.
        """
        adapter = run_dir / "adapter"
        if (lora := config.model.lora) is not None and lora.tokens == "all" and not adapter.exists():
            student = self.engine.module.student
            dist.barrier()  # no rank makes the folder before every rank has looked for it
            folder = adapter if dist.get_rank() == 0 else None
            self.require(str(adapter), lambda: save_adapter(student, lora, start, folder, zero.gathered))
        destination = run_dir / "student"

        def write() -> None:
            if pack is None or destination.exists():
                return
            student = load_model(start, config.model.dtype)
            load_weights(student, pack)
            grid = BlockGrid(config.rollout.block_size, config.rollout.block_grid)
            save_student(student, start, destination, grid, config.decoding_order)

        self.require(str(destination), write)

    def _advice(self, problem: str) -> str:
        newest = _newest_checkpoint(self.root) if dist.get_rank() == 0 else "see rank 0"
        return f"{problem}; {newest}; make room and go on with --resume"


def forget_student(run_dir: Path) -> None:
    """Removes the finished student of a run that trains further, as after an early stop: it would be outdated."""
    for folder in (run_dir / "student", run_dir / "adapter"):
        if folder.exists():
            aside = folder.with_name(f".old-{folder.name}.{os.getpid()}")
            folder.rename(aside)  # in one step: no half of a student can be taken for a whole one
            shutil.rmtree(aside)


def problem_of_first_rank(act: Callable[[], object], device: torch.device | str = "cpu") -> str | None:
    """Runs `act` on every rank, where only the first rank may write, and tells all ranks whether its disk failed.

    A collective call, after any collective calls in `act`.

    Args:
        device: where the process group's tensors are.

    Returns: None, or on every rank why the first rank's disk did not take it. Other errors are raised.
    """
    problem = None
    try:
        act()
    except _DISK_ERRORS as error:
        if dist.get_rank() != 0:
            raise
        cause = getattr(error, "cause", None) or error  # the error inside a Ray task has it as its cause
        problem = " ".join(str(cause).split()) or type(cause).__name__
    failed = torch.tensor([problem is not None], dtype=torch.int32, device=device)
    dist.broadcast(failed, 0)
    return (problem or "see rank 0") if failed.item() else None


def _newest_checkpoint(root: Path) -> str:
    """The newest whole checkpoint, in words for an error."""
    try:
        found = latest_checkpoint(root)
    except (OSError, OpdlmError) as error:
        return str(error)
    return f"the newest whole checkpoint is {found.folder}" if found else f"there is no checkpoint in {root}"


def _free_space(folder: Path) -> str:
    """Free space on a folder's disk, in words for an error."""
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        return f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB free"
    except OSError as error:
        return f"free space unknown: {error}"
