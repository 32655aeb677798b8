"""One optimizer step over one batch of trajectories, the same on any number of ranks and micro-batches.

Each rank makes rows of its share, and every loss position gets the weight that it has in the *global* batch:
`1 / (positions of its row x rows)` for `reduction: row`, `1 / positions` for `reduction: token`. The gradient is then
a plain sum over ranks and micro-batches, and how the batch was split cannot matter.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from opdlm.common.batches import in_groups
from opdlm.common.config.schema import LearnerConfig, ObjectiveConfig
from opdlm.common.grid import BlockGrid
from opdlm.common.types import ScoredTrajectory
from opdlm.learner.packing import MicroBatch, pack
from opdlm.learner.rows import Row, build_rows
from opdlm.learner.targets import gather_targets


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
    """Rows left out because no masked position counts (a response of only an end-of-sequence token, say)."""
    loss_positions: int
    tokens: int
    """Tokens of the forwards."""
    attention_padding: int
    """Places of padding beside them, which attention alone has (`row_attention.py`)."""
    seconds: float
    skipped: bool = False
    """The gradient was not finite, so the weights and AdamW's state are as they were; loss and norm are not numbers."""


class TrainStep:
    """Rows, micro-batches, weights, backward, step.

    Args:
        engine: DeepSpeed engine around a `DistillModule` (see `learner/zero.py`), or anything with its `__call__`,
            `backward`, `step`, `set_gradient_accumulation_boundary`, `get_global_grad_norm`, `device`, `module`; its
            step is none where the gradient is not finite, and `optimizer.overflow` then says so.
        teacher_head: the teacher's output matrix `[V, D]`, for hidden-state targets.
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
    ) -> None:
        self.engine = engine
        self.learner = learner
        self.objective = objective
        self.grid = grid
        self.mask_id = mask_id
        self.teacher_head = teacher_head
        self.seed = seed

    def __call__(
        self, share: Sequence[ScoredTrajectory], spare: ScoredTrajectory, learning_rate: float, pass_: int = 0
    ) -> StepResult:
        """Trains on this rank's share of the batch, which may be empty. A collective call.

        Args:
            spare: any trajectory: ranks with fewer micro-batches than others run it with weight 0 to keep step.
            pass_: which time the trajectories are trained on; drawn states are others in each.
        """
        started = time.perf_counter()
        rows = [row for scored in share for row in self._rows(scored, pass_)]
        useful = sorted((r for r in rows if len(r.loss_positions)), key=lambda r: -len(r.input_ids))
        size = self.learner.micro_batch_rows
        micro = [pack(group) for group in in_groups(useful, size)]
        positions = sum(len(r.loss_positions) for r in useful)
        counts = self._sum([len(useful), len(rows) - len(useful), positions])
        total_rows, without_loss, total_positions = (int(c) for c in counts)
        # Ranks must run equally many forwards: ZeRO-3 gathers in them.
        forwards = int(self._reduce([len(micro)], dist.ReduceOp.MAX)[0])
        if not total_rows:
            return StepResult(0.0, 0.0, 0, without_loss, 0, 0, 0, time.perf_counter() - started)

        self.engine.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        loss, padding = 0.0, 0
        for i in range(forwards):
            batch = micro[i] if i < len(micro) else pack(self._rows(spare, pass_)[:1])
            weights = self._weights(batch, total_rows, total_positions) * (i < len(micro))
            self.engine.set_gradient_accumulation_boundary(i == forwards - 1)
            loss += self._backward(batch, weights)
            padding += self.engine.module.padding * (i < len(micro))
        self.engine.step()
        sums = self._sum([loss, sum(b.input_ids.numel() for b in micro), padding])
        return StepResult(
            loss=float(sums[0]),
            grad_norm=float(self.engine.get_global_grad_norm() or 0.0),
            rows=total_rows,
            rows_without_loss=without_loss,
            loss_positions=total_positions,
            tokens=int(sums[1]),
            attention_padding=int(sums[2]),
            seconds=time.perf_counter() - started,
            skipped=bool(self.engine.optimizer.overflow),
        )

    def _rows(self, scored: ScoredTrajectory, pass_: int) -> list[Row]:
        # Seeded by sample and pass alone: the same states whichever rank and whichever life of the job builds them.
        rng = np.random.default_rng([self.seed, scored.trajectory.index] + [pass_] * (pass_ > 0))
        return build_rows(scored, self.grid, self.objective, self.mask_id, rng)

    def _weights(self, batch: MicroBatch, total_rows: int, total_positions: int) -> torch.Tensor:
        if self.objective.reduction == "token":
            return torch.full((len(batch.loss_row),), 1 / total_positions)
        counts = torch.tensor([len(row.loss_positions) for row in batch.rows])
        return 1.0 / (counts[batch.loss_row] * total_rows)

    def _backward(self, batch: MicroBatch, weights: torch.Tensor) -> float:
        device = self.engine.device
        targets = gather_targets(batch.rows, self.teacher_head, self.objective).to(device)
        # DeepSpeed averages over ranks; we want the sum.
        loss, losses = self.engine(batch.to(device), targets, weights.to(device) * dist.get_world_size())
        self.engine.backward(loss)
        return float((losses.cpu() * weights).sum())

    def _sum(self, values: Sequence[float]) -> torch.Tensor:
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: Sequence[float], operation: Any) -> torch.Tensor:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(tensor, operation)
        return tensor
