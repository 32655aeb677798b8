"""One optimizer step over one batch of trajectories, the same on any number of ranks and micro-batches.

One training step, in reading order: deploy/run/train.py (the driver) -> deploy/run/loops.py ->
actors/rollout/decoder.py -> actors/teacher/scoring.py -> actors/queue/rules.py -> this file -> learner/losses.py. Every
rank of the learner takes whole rounds from the queue (`worker.py`), cuts them into batches (`round_training.py`) and
calls a `TrainStep` with its share of each batch:

    share of scored trajectories
      │ states.py, rows.py      training rows: which positions are masked, and at which of them the loss is taken
      │ packing.py              micro-batches: rows of at most `micro_batch_tokens`, laid out for one forward
      ▼ for each micro-batch
      │ targets.py              the teacher's distributions at its loss positions
      │ distill.py              the student's forward, then the losses (chunked_loss.py, losses.py)
      │ zero.py                 backward
      ▼ once
        zero.py                 gradients summed over ranks and clipped, AdamW's step

Every loss position has the weight that it has in the *global* batch: `1 / (positions of its row x rows)` for
`reduction: row`, `1 / positions` for `reduction: token` (times its own weight, and divided by the sum of these, where
positions have weights). So the gradient is a plain sum over ranks and micro-batches,
and it does not matter how the batch was divided (METHOD.md section 5).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from opdlm.common.config.schema import LearnerConfig, ObjectiveConfig
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import PolicyTargets, ScoredTrajectory
from opdlm.learner.packing import MicroBatch, micro_batches, pack
from opdlm.learner.policy_gradient import Draws, PolicyPositions, gather_policy, is_left_out
from opdlm.learner.rows import Row, build_rows
from opdlm.learner.targets import PositionTargets, gather_targets


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did, summed over ranks. Equal on every rank."""

    loss: float
    """The batch's loss before the step, in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    rows: int
    """Rows that had a loss position."""
    rows_without_loss: int
    """Rows left out because they have no loss position (of a response that is only an end-of-sequence token, say)."""
    loss_positions: int
    tokens: int
    """Tokens that went through the student."""
    attention_padding: int
    """Places of padding beside them, which only attention has (`row_attention.py`)."""
    seconds: float
    policy: dict[str, float] = field(default_factory=dict)
    """Of `rl`: see `PolicyPositions.figures`. Empty for the other objectives."""
    skipped: bool = False
    """The gradient was not finite, so weights and AdamW's state are unchanged; loss or gradient norm is not finite."""


class TrainStep:
    """Trains the engine's module by one optimizer step at each call.

    Args:
        engine: DeepSpeed engine around a `DistillModule` (`zero.py`), or anything that has its `__call__`, `backward`,
            `step`, `set_gradient_accumulation_boundary`, `get_global_grad_norm`, `optimizer`, `device` and `module`.
            Where the gradient is not finite, `step` changes nothing and sets `optimizer.overflow`.
        mask_id: the student's mask token.
        teacher_head: the teacher's output matrix `[V, D]`, for hidden-state targets.
        seed: of the drawn states.
        tokens: the tokens that teacher and student share. None: all rows of the teacher.
        form: the student's.
        draws: what the rollouts were drawn from, for `rl`.
    """

    def __init__(
        self,
        engine: Any,
        learner: LearnerConfig,
        objective: ObjectiveConfig,
        grid: BlockGrid,
        mask_id: int,
        teacher_head: torch.Tensor | None,
        seed: int,
        tokens: TokenIds | None = None,
        form: StudentForm = PAPER_FORM,
        draws: Draws | None = None,
    ) -> None:
        self.engine = engine
        self.learner = learner
        self.objective = objective
        self.grid = grid
        self.mask_id = mask_id
        self.teacher_head = teacher_head
        self.seed = seed
        self.tokens = tokens
        self.form, self.draws = form, draws

    def __call__(
        self, share: Sequence[ScoredTrajectory], filler: ScoredTrajectory, learning_rate: float, pass_number: int = 0
    ) -> StepResult:
        """Trains on this rank's share of the batch, which may be empty. A collective call.

        Args:
            filler: any trajectory, best a short one. A rank with fewer micro-batches than another runs the filler's
                first row with weight 0 instead, so that all ranks run equally many forwards.
            pass_number: how many times the round was trained on before; each pass draws states of its own.
        """
        started = time.perf_counter()
        rows = [row for scored in share for row in self._rows(scored, pass_number)]
        useful = [row for row in rows if row.loss_weights.any()]
        batches = micro_batches(useful, self.learner.micro_batch_tokens)
        counts = [len(useful), len(rows) - len(useful), sum(len(row.loss_positions) for row in useful)]
        *totals, total_tokens = self._sum([*counts, self._loss_tokens(share, useful)]).tolist()
        total_rows, without_loss, positions = (int(total) for total in totals)
        forwards = int(self._reduce([len(batches)], dist.ReduceOp.MAX)[0])
        if not total_rows:
            return StepResult(
                loss=0.0,
                grad_norm=0.0,
                rows=0,
                rows_without_loss=without_loss,
                loss_positions=0,
                tokens=0,
                attention_padding=0,
                seconds=time.perf_counter() - started,
            )
        self.engine.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        loss, padding, policy = 0.0, 0, Counter[str]()
        for i in range(forwards):  # equally many on every rank: ZeRO-3 gathers weights in each
            is_filler = i >= len(batches)
            batch = pack(self._rows(_in_loss(filler), pass_number)[:1]) if is_filler else batches[i]
            weights = self._weights(batch, total_rows, total_tokens) * (not is_filler)
            self.engine.set_gradient_accumulation_boundary(i == forwards - 1)
            part, figures = self._backward(batch, weights)
            loss += part
            policy.update(figures)
            padding += self.engine.module.padding * (not is_filler)
        self.engine.step()
        sums = self._sum([loss, sum(batch.input_ids.numel() for batch in batches), padding, *policy.values()])
        return StepResult(
            loss=float(sums[0]),
            grad_norm=float(self.engine.get_global_grad_norm() or 0.0),
            rows=total_rows,
            rows_without_loss=without_loss,
            loss_positions=positions,
            tokens=int(sums[1]),
            attention_padding=int(sums[2]),
            seconds=time.perf_counter() - started,
            policy=dict(zip(policy, sums[3:].tolist(), strict=True)),
            skipped=bool(self.engine.optimizer.overflow),
        )

    def _loss_tokens(self, share: Sequence[ScoredTrajectory], rows: Sequence[Row]) -> float:
        """What a mean over tokens divides by: the weights of the loss positions, or all responses' tokens for `rl`.

        A response whose group is left out has none.
        """
        if self.objective.kind != "rl":
            return float(sum(row.loss_weights.sum() for row in rows))
        return sum(scored.trajectory.response_length for scored in share if not is_left_out(scored))

    def _rows(self, scored: ScoredTrajectory, pass_number: int) -> list[Row]:
        if is_left_out(scored):
            return []
        # Seeded by sample and pass alone: whichever rank builds the rows, and after any restart, the states are these.
        rng = np.random.default_rng([self.seed, scored.trajectory.index] + [pass_number] * (pass_number > 0))
        return build_rows(scored, self.grid, self.objective, self.mask_id, rng, self.form)

    def _weights(self, batch: MicroBatch, total_rows: int, total_tokens: float) -> torch.Tensor:
        """The weight of each loss position in the global batch, `[N]` float32."""
        each = torch.from_numpy(np.concatenate([row.loss_weights for row in batch.rows]))
        if self.objective.kind == "rl" or self.objective.reduction == "token":
            return each / total_tokens
        sums = torch.tensor([float(row.loss_weights.sum()) for row in batch.rows])
        return each / (sums[batch.loss_row] * total_rows)

    def _backward(self, batch: MicroBatch, weights: torch.Tensor) -> tuple[float, dict[str, float]]:
        """Runs a micro-batch forward and backward; returns its parts of the batch's loss and of `StepResult.policy`."""
        device = self.engine.device
        targets = self._targets(batch.rows).to(device)
        # DeepSpeed averages gradients over ranks; multiplied by their number, the average is the sum.
        loss, losses = self.engine(batch.to(device), targets, weights.to(device) * dist.get_world_size())
        self.engine.backward(loss)
        policy = targets.figures(self.objective, weights) if isinstance(targets, PolicyPositions) else {}
        return float((losses.cpu() * weights).sum()), policy

    def _targets(self, rows: Sequence[Row]) -> PositionTargets | PolicyPositions:
        if self.objective.kind == "rl":
            assert self.draws is not None, "the learner gives them"
            return gather_policy(rows, self.draws, self._teachers(rows) if self.objective.asks_teacher else None)
        return self._teachers(rows)

    def _teachers(self, rows: Sequence[Row]) -> PositionTargets:
        return gather_targets(rows, self.teacher_head, self.objective, self.tokens)

    def _sum(self, values: Sequence[float]) -> torch.Tensor:
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: Sequence[float], operation: Any) -> torch.Tensor:
        """The values over all ranks, `[len(values)]` float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(tensor, operation)
        return tensor


def _in_loss(scored: ScoredTrajectory) -> ScoredTrajectory:
    """The same, or with advantage 0 where its group is left out, so that it makes rows."""
    if not (is_left_out(scored) and isinstance(scored.targets, PolicyTargets)):
        return scored
    return replace(scored, targets=replace(scored.targets, advantage=0.0))
