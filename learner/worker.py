"""What one ZeRO rank does: take a round, train on it, publish the weights, save. Runs in Ray Train's worker group.

    restore ─► publish ─► for each round: take ─► train ─► publish version r + 1 ─► save, if due ─► export the student
                                           │
                                           └ None: an end was requested; save and end

A rank that dies takes the group down. Ray Train starts the group again, and it goes on from the last checkpoint with
the same samples, which the queue keeps until a checkpoint covers them. A sample whose data is lost with a node is made
again while the rank waits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.device import device_for
from opdlm.common.model.facts import never_drawn, read_facts, require_mask
from opdlm.common.tensors import is_finite
from opdlm.common.types import WeightPack
from opdlm.common.weights import WeightPacker
from opdlm.learner import zero
from opdlm.learner.distill import DistillModule
from opdlm.learner.policy_gradient import Draws
from opdlm.learner.queue_client import QueueClient
from opdlm.learner.round_training import RoundTrainer
from opdlm.learner.saving import BehindQueue, GiveUp, Saver, forget_student
from opdlm.learner.schedule import Progress, TrainingSchedule
from opdlm.learner.setup import LearnerSetup
from opdlm.learner.targets import load_teacher_head
from opdlm.learner.train_step import TrainStep


def run_rank(setup: LearnerSetup) -> None:
    """Runs one rank from its start to its end.

    `GiveUp` and `BehindQueue` are reported to the queue, not raised: a restart of the group would not help.
    """
    if problem := missing_gpu(config_from_dict(setup.config)):
        _give_up(setup, problem)
        return
    learner = Learner(setup)
    try:
        learner.run()
    except GiveUp as reason:
        learner.give_up(str(reason))
    except BehindQueue as reason:
        learner.go_back(str(reason))


def missing_gpu(config: OpdlmConfig) -> str | None:
    """Why the ranks cannot use the GPUs that Ray reserved for them; None where they can, and the same on each rank."""
    if config.learner.gpus_per_worker == 0 or dist.get_backend() != "gloo":  # `gpu_backend.py` chooses gloo
        return None
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, _problem_of_device(config.learner.gpus_per_worker))
    return next((f"learner rank {rank}: {found}" for rank, found in enumerate(problems) if found), None)


def _problem_of_device(gpus: float) -> str | None:
    try:
        device_for(gpus, "learner.gpus_per_worker")
    except OpdlmError as problem:
        return str(problem)
    return None


def _give_up(setup: LearnerSetup, reason: str) -> None:
    if dist.get_rank() == 0:
        limit = config_from_dict(setup.config).resources.call_timeout_seconds
        QueueClient(setup.queue, 0, limit).give_up(reason)
    dist.barrier()


class Learner:
    """One rank: its engine, the run's schedule, and how far the run has come."""

    def __init__(self, setup: LearnerSetup) -> None:
        self.setup = setup
        self.config = config = config_from_dict(setup.config)
        self.rank = dist.get_rank()
        self.run_dir = Path(config.run.dir)
        self.progress = Progress()
        self.schedule = TrainingSchedule(
            setup.total_samples,
            config.rollout.samples_per_round,
            config.learner.batch_size,
            config.run.seed,
            config.learner.passes,
        )
        _configure_torch(config)
        self.queue = QueueClient(setup.queue, self.rank, config.resources.call_timeout_seconds)
        facts = read_facts(setup.student)
        module = DistillModule.load(setup.student, config, facts.form)
        self.engine = zero.initialise(module, config.learner, config.model.dtype)
        self.saver = Saver(
            self.engine, self.run_dir / "checkpoints", config.checkpoint.keep, config.checkpoint.max_failed_saves
        )
        step = TrainStep(
            self.engine,
            config.learner,
            config.objective,
            BlockGrid(config.rollout.block_size, config.rollout.block_grid),
            require_mask(facts),
            load_teacher_head(config, self.engine.device),
            config.run.seed,
            setup.tokens,
            facts.form,
            Draws(config.rollout.temperature, never_drawn(facts)),
        )
        self.train = RoundTrainer(
            config, setup.data_digest, self.schedule, self.progress, step, self.queue, self.saver, self._tell
        )
        self.packer = WeightPacker(on_device=config.rollout.weight_transport == "nixl")

    def run(self) -> None:
        """Trains to the end of the run, or until a stop is requested."""
        saved = self._restore()
        pack = self._publish()
        while self.progress.rounds < self.schedule.rounds:
            started = time.perf_counter()
            taken = self.queue.take_round(self.progress.rounds)
            if taken is None:
                break
            samples, staleness = taken
            if self.rank == 0:
                forget_student(self.run_dir)
            self.train(samples, staleness, wait_seconds=time.perf_counter() - started)
            del taken, samples  # the queue alone holds samples after their round (deploy/run/sample_references.py)
            pack = self._publish()
            if self._save_is_due() and self._save():
                saved = self.progress.rounds
        if saved != self.progress.rounds:
            self._save(last=True)
        if self.progress.rounds == self.schedule.rounds or self.queue.ends_early():
            self.saver.export_student(self.run_dir, self.setup.student, self.config, pack)
        dist.barrier()

    def give_up(self, reason: str) -> None:
        """Has the driver end the run as a failure with this reason, once every record so far is written."""
        if self.rank == 0:
            self.queue.give_up(reason)
        dist.barrier()

    def go_back(self, reason: str) -> None:
        """Has the driver start again from an older checkpoint, with a new queue."""
        if self.rank == 0:
            self.queue.go_back(reason)
        dist.barrier()

    def _restore(self) -> int | None:
        """Goes on from the last checkpoint that the queue knows of; returns its rounds, None where there is none."""
        checkpoint = self.saver.restore(self.queue.committed_rounds())
        if checkpoint is not None:
            self.progress.rounds = checkpoint.rounds
            self.progress.optimizer_steps = int(checkpoint.state["optimizer_steps"])
            self.progress.rollout_tokens = int(checkpoint.state["rollout_tokens"])
        self._tell(kind="learner_start")
        return checkpoint.rounds if checkpoint else None

    def _publish(self) -> WeightPack | None:
        """Gathers the weights on all ranks; rank 0 publishes them, under the number of trained rounds as version.

        Returns: the published pack on rank 0, None on the other ranks.

        Raises:
            GiveUp: a weight is NaN or infinite; nothing is published.
        """
        started, version = time.perf_counter(), self.progress.rounds
        broken: list[str] = []
        weights = _watched(zero.full_parameters(self.engine), broken)
        held = self.config.rollout.weight_transport != "object_store"
        # The last version is read when the learner has ended, so it must not stay on this rank's device.
        packer = WeightPacker() if held and version == self.schedule.rounds else self.packer
        pack = packer.pack(version, weights) if self.rank == 0 else None
        for _ in weights:  # the other ranks take part in gathering each of them
            continue
        if broken:  # on every rank, because all have seen the same weights
            rate = self.config.learner.optimizer.lr
            raise GiveUp(
                f"weights of version {version}: {broken[0]} holds NaN or infinity, as {len(broken)} tensors do; "
                f"training has diverged: start a run with a learner.optimizer.lr below {rate:g}"
            )
        if pack is None:
            return None
        if held and version < self.schedule.rounds:
            self.queue.publish_held(pack)
        else:
            self.queue.publish(pack)
        self._tell(
            kind="publish",
            weight_version=version,
            publish_seconds=time.perf_counter() - started,
            nbytes=pack.nbytes,
        )
        return pack

    def _save_is_due(self) -> bool:
        """Whether a checkpoint is due now. The one after the last round is written when the loop has ended."""
        rounds = self.progress.rounds
        return rounds % self.config.checkpoint.every_rounds == 0 and rounds < self.schedule.rounds

    def _save(self, last: bool = False) -> bool:
        """Writes a checkpoint and has the queue release the samples that it covers. A collective call.

        Returns: whether it was written. Where it was not, the queue keeps the samples and the run goes on.

        Raises:
            GiveUp: it was not written, and the run may not go on (`checkpoint.max_failed_saves`, or `last`).
        """
        started = time.perf_counter()
        if self.rank == 0:
            self.queue.wait_until_written()
        problem = self.saver.save(self._state())
        seconds = time.perf_counter() - started
        if problem is not None:
            failed = {"saves": 1, "in_a_row": self.saver.failed_in_a_row, "reason": problem}
            self._tell(kind="failed_save", checkpoint_seconds=seconds, **failed)
            self.saver.end_if_due(problem, self.progress.rounds, last)
            return False
        if self.rank == 0:
            self.queue.committed(self.progress.rounds)
            self._tell(kind="checkpoint", checkpoint_seconds=seconds)
        return True

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says of the run.

        Data order, decoding and the choice of states depend on (seed, sample index) alone, so the index of the next
        sample stands for their random state.
        """
        rounds = self.progress.rounds
        return asdict(self.progress) | {
            "weight_version": rounds,
            "next_sample": min(rounds * self.schedule.prompts_per_round, self.schedule.total),
            "total_samples": self.schedule.total,
            "seed": self.config.run.seed,
            "torch_random_state": torch.get_rng_state().numpy().tobytes().hex(),
            "config_digest": self.setup.config_digest,
            "data_digest": self.setup.data_digest,
        }

    def _tell(self, **event: Any) -> None:
        """Sends a record for the metrics with the run's progress, from rank 0 alone."""
        if self.rank == 0:
            self.queue.tell({"round": self.progress.rounds, "step": self.progress.optimizer_steps, **event})


def _watched(weights: Iterator[tuple[str, torch.Tensor]], broken: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights unchanged; the names of those that are not finite are appended to `broken`."""
    for name, weight in weights:
        if not is_finite(weight):
            broken.append(name)
        yield name, weight


def _configure_torch(config: OpdlmConfig) -> None:
    torch.set_num_threads(max(int(config.learner.cpus_per_worker), 1))
    torch.manual_seed(config.run.seed)
    torch.use_deterministic_algorithms(config.run.deterministic)
    # torch would fill fresh memory so that reads of it show; DeepSpeed allocates 2 GB in each backward.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
