"""Trains on one round: cuts it into batches, shares them among the ranks, runs the optimizer steps, records them.

`worker.py` calls this with each round that it takes; `train_step.py` runs the single steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opdlm.common.config import OpdlmConfig
from opdlm.common.model.config import read_config
from opdlm.common.model.shards import weights_fingerprint
from opdlm.common.samples import SampleRef
from opdlm.learner.queue_client import QueueClient
from opdlm.learner.rollout_files import RolloutFacts, facts_of, round_file
from opdlm.learner.rollout_tasks import start_dump
from opdlm.learner.round_samples import RoundSamples
from opdlm.learner.saving import GiveUp, Saver
from opdlm.learner.schedule import Progress, TrainingSchedule, learning_rate, share_by_work, training_work
from opdlm.learner.train_step import StepResult, TrainStep


class RoundTrainer:
    """Trains on one round after another.

    Args:
        config: the run file.
        data_digest: fingerprint of the prompts, for saved rollouts.
        schedule: the run's.
        progress: counts every step and round.
        step: the optimizer step of this rank.
        queue: fetches samples.
        saver: ends the run where rollouts cannot be saved.
        tell: sends a record for the metrics, given as keyword arguments.
    """

    def __init__(
        self,
        config: OpdlmConfig,
        data_digest: str,
        schedule: TrainingSchedule,
        progress: Progress,
        step: TrainStep,
        queue: QueueClient,
        saver: Saver,
        tell: Callable[..., None],
    ) -> None:
        self.config, self.data_digest = config, data_digest
        self.schedule, self.progress = schedule, progress
        self.step, self.queue, self.saver, self.tell = step, queue, saver, tell
        self.device = step.engine.device
        self._skipped_in_a_row = 0

    def __call__(self, taken: list[SampleRef], staleness: list[int], wait_seconds: float) -> None:
        """Trains on a round. A collective call.

        Args:
            taken: the round's samples, in index order.
            staleness: of each sample, in rounds.
            wait_seconds: how long this rank waited for the round.

        Raises:
            GiveUp: too many steps in a row were skipped, or the round's rollouts could not be saved.
        """
        started, progress = time.perf_counter(), self.progress
        dump = self._start_dump(taken)
        work = self._work(taken)
        first = progress.rounds * self.schedule.prompts_per_round
        samples = RoundSamples(taken, first, self.queue)
        total_steps = self.schedule.steps_before(self.schedule.rounds)
        tokens = forward_tokens = 0
        for pass_number, places in self.schedule.batches(progress.rounds, len(taken)):
            share = samples.fetch(share_by_work(places, work, dist.get_world_size())[dist.get_rank()])
            filler = share[-1] if share else samples.fetch([min(places, key=work.__getitem__)])[0]  # the shortest
            rate = learning_rate(progress.optimizer_steps, total_steps, self.config.learner.optimizer)
            result = self.step(share, filler, rate, pass_number)
            progress.optimizer_steps += 1
            self._record_step(result, rate, [first + place for place in places], pass_number)
            forward_tokens += result.tokens
            if pass_number == 0:
                tokens += sum(sample.trajectory.response_length for sample in share)
        # The rollouts are on the disk before a checkpoint can cover the round.
        self.saver.require(
            f"{self.config.run.dir}/rollouts",
            lambda: dump and self.queue.wait_for(dump, "writing the round's rollouts"),
        )
        all_tokens = torch.tensor([tokens], dtype=torch.float64, device=self.device)
        dist.all_reduce(all_tokens)
        progress.rounds += 1
        progress.rollout_tokens += int(all_tokens)
        self.tell(
            kind="round",
            rollout_tokens=progress.rollout_tokens,
            round_tokens=int(all_tokens),
            train_forward_tokens=forward_tokens,
            staleness_mean=sum(staleness) / len(staleness),
            staleness_max=max(staleness),
            learner_wait_seconds=wait_seconds,
            train_seconds=time.perf_counter() - started,
        )

    def _start_dump(self, samples: list[SampleRef]) -> Any:
        """Starts writing the round's samples to its file, on rank 0 of a run with `run.dump_rollouts`; else None."""
        if dist.get_rank() != 0 or not self.config.run.dump_rollouts:
            return None
        file = round_file(Path(self.config.run.dir) / "rollouts", self.progress.rounds)
        return start_dump(file, samples, self._rollout_facts)

    @cached_property
    def _rollout_facts(self) -> RolloutFacts:
        """What all rounds' saved rollouts say of the run. The teacher's files are read once for it."""
        teacher = self.config.model.teacher
        return facts_of(self.config, read_config(teacher).vocab_size, self.data_digest, weights_fingerprint(teacher))

    def _work(self, samples: list[SampleRef]) -> list[float]:
        """`training_work` as rank 0 knows it, on every rank. A collective call.

        Ranks may have taken different samples: one that was made again in between may have another length.
        """
        work = training_work(samples, self.config.objective, self.config.rollout.block_size)
        agreed = torch.tensor(work, dtype=torch.float64, device=self.device)
        dist.broadcast(agreed, 0)
        return agreed.tolist()

    def _record_step(self, result: StepResult, rate: float, indices: Sequence[int], pass_number: int) -> None:
        """Records an optimizer step on the samples of these indices.

        Raises:
            GiveUp: more than `learner.max_skipped_steps` in a row were skipped.
        """
        trained_on = {"samples": indices, "pass_number": pass_number}
        if not result.rows:
            reason = "no response has a token to learn from (of `rl`: in each group all rewards are equal)"
            self.tell(kind="skipped_step", steps=1, in_a_row=0, reason=reason, **trained_on)
            return
        if not result.skipped:
            self._skipped_in_a_row = 0
            kl = {"forward_kl_nats": result.loss} if self.config.objective.loss_is_forward_kl else {}
            padding = result.attention_padding / max(result.tokens + result.attention_padding, 1)
            details = {**trained_on, **asdict(result), **kl}
            details |= details.pop("policy")
            self.tell(kind="step", learning_rate=rate, attention_padding_share=padding, **details)
            return
        self._skipped_in_a_row += 1
        reason = f"loss {result.loss}, gradient norm {result.grad_norm}"
        self.tell(kind="skipped_step", steps=1, in_a_row=self._skipped_in_a_row, reason=reason, **trained_on)
        limit = self.config.learner.max_skipped_steps
        if self._skipped_in_a_row > limit:
            raise GiveUp(
                f"optimizer step {self.progress.optimizer_steps}: {reason}, {self._skipped_in_a_row} in a row "
                f"(learner.max_skipped_steps {limit}); the last checkpoint in {self.config.run.dir} is from before them"
            )
