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
`reduction: row`, `1 / positions` for `reduction: token`. So the gradient is a plain sum over ranks and micro-batches,
and it does not matter how the batch was divided (METHOD.md section 5).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from opdlm.common.config.schema import LearnerConfig, ObjectiveConfig
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import ScoredTrajectory
from opdlm.learner.packing import MicroBatch, micro_batches, pack
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
    """Rows left out because they have no loss position (of a response that is only an end-of-sequence token, say)."""
    loss_positions: int
    tokens: int
    """Tokens that went through the student."""
    attention_padding: int
    """Places of padding beside them, which only attention has (`row_attention.py`)."""
    seconds: float
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
    ) -> None:
        self.engine = engine
        self.learner = learner
        self.objective = objective
        self.grid = grid
        self.mask_id = mask_id
        self.teacher_head = teacher_head
        self.seed = seed
        self.tokens = tokens
        self.form = form

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
        useful = [row for row in rows if len(row.loss_positions)]
        batches = micro_batches(useful, self.learner.micro_batch_tokens)
        counts = [len(useful), len(rows) - len(useful), sum(len(row.loss_positions) for row in useful)]
        total_rows, without_loss, total_positions = (int(total) for total in self._sum(counts))
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
        loss, padding = 0.0, 0
        for i in range(forwards):  # equally many on every rank: ZeRO-3 gathers weights in each
            is_filler = i >= len(batches)
            batch = pack(self._rows(filler, pass_number)[:1]) if is_filler else batches[i]
            weights = self._weights(batch, total_rows, total_positions) * (not is_filler)
            self.engine.set_gradient_accumulation_boundary(i == forwards - 1)
            loss += self._backward(batch, weights)
            padding += self.engine.module.padding * (not is_filler)
        self.engine.step()
        sums = self._sum([loss, sum(batch.input_ids.numel() for batch in batches), padding])
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

    def _rows(self, scored: ScoredTrajectory, pass_number: int) -> list[Row]:
        # Seeded by sample and pass alone: whichever rank builds the rows, and after any restart, the states are these.
        rng = np.random.default_rng([self.seed, scored.trajectory.index] + [pass_number] * (pass_number > 0))
        return build_rows(scored, self.grid, self.objective, self.mask_id, rng, self.form)

    def _weights(self, batch: MicroBatch, total_rows: int, total_positions: int) -> torch.Tensor:
        """The weight of each loss position in the global batch, `[N]` float32."""
        if self.objective.reduction == "token":
            return torch.full((len(batch.loss_row),), 1 / total_positions)
        counts = torch.tensor([len(row.loss_positions) for row in batch.rows])
        return 1.0 / (counts[batch.loss_row] * total_rows)

    def _backward(self, batch: MicroBatch, weights: torch.Tensor) -> float:
        """Runs a micro-batch forward and backward; returns its part of the batch's loss."""
        device = self.engine.device
        targets = gather_targets(batch.rows, self.teacher_head, self.objective, self.tokens).to(device)
        # DeepSpeed averages gradients over ranks; multiplied by their number, the average is the sum.
        loss, losses = self.engine(batch.to(device), targets, weights.to(device) * dist.get_world_size())
        self.engine.backward(loss)
        return float((losses.cpu() * weights).sum())

    def _sum(self, values: Sequence[float]) -> torch.Tensor:
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: Sequence[float], operation: Any) -> torch.Tensor:
        """The values over all ranks, `[len(values)]` float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(tensor, operation)
        return tensor
