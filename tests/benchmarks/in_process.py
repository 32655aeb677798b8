"""A run in one process, without Ray and DeepSpeed. It decodes, scores and trains in turn, with the code of every run.

`loop.py` compares the distributed run with it; `learning.py` compares settings in it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.scoring import score
from opdlm.common.config import OpdlmConfig
from opdlm.common.grid import BlockGrid
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.load import load_model, load_output_matrix
from opdlm.common.types import ScoredTrajectory
from opdlm.deploy.run.preflight import preflight
from opdlm.deploy.run.sources import rollout_request
from opdlm.learner.distill import DistillModule
from opdlm.learner.schedule import learning_rate
from opdlm.learner.train_step import TrainStep


class PlainEngine:
    """AdamW, with the methods of a DeepSpeed engine that `TrainStep` calls."""

    def __init__(self, module: DistillModule, config: OpdlmConfig) -> None:
        self.module, self.device = module, torch.device("cpu")
        how = config.learner.optimizer
        self._clip, self._norm = how.grad_clip, 0.0
        self.optimizer: Any = torch.optim.AdamW(
            module.parameters(), lr=how.lr, betas=how.betas, eps=how.eps, weight_decay=how.weight_decay
        )
        self.optimizer.overflow = False

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def train(self) -> None:
        """Sets the module to train mode."""
        self.module.train()

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        """Does nothing: PyTorch adds gradients up until they are cleared."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds to the gradients."""
        loss.backward()

    def get_global_grad_norm(self) -> float:
        """The gradient norm before clipping."""
        return self._norm

    def step(self) -> None:
        """Clips the gradients, makes AdamW's step, clears the gradients."""
        self._norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Round:
    """The figures of one round."""

    losses: list[float]
    response_tokens: int
    seconds: float
    rollout_seconds: float
    teacher_seconds: float
    train_seconds: float


class InProcess:
    """A run with `queue.max_staleness` 0.

    Args:
        folder: gets the converted student, if it does not have it yet.
    """

    def __init__(self, config: OpdlmConfig, folder: Path) -> None:
        self.config, checked = config, preflight(config)
        self.order, self.schedule = checked.order, checked.schedule
        student = folder / "student_init"
        if not student.exists():
            grid, form = (config.rollout.block_size, config.rollout.block_grid), config.model.converted_form
            convert_checkpoint(config.model.teacher, student, *grid, logit_shift=form.logit_shift, context=form.context)
        facts = read_facts(student)
        self.mask_id, self.eos_ids = require_mask(facts), facts.eos_ids
        self.teacher = load_model(config.model.teacher, config.teacher.dtype)
        self.student = load_model(student, config.model.dtype)
        rollout = config.rollout
        how = DecodeSettings.from_config(rollout)
        self.decoder = BlockDecoder(self.student, how, self.mask_id, self.eos_ids, rollout.batch_size, form=facts.form)
        module = DistillModule(self.student, config.objective, config.learner.logits_chunk, form=facts.form)
        if not dist.is_initialized():
            store = dist.FileStore(tempfile.mktemp(), 1)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.step = TrainStep(
            PlainEngine(module, config),
            config.learner,
            config.objective,
            BlockGrid(rollout.block_size, rollout.block_grid),
            self.mask_id,
            load_output_matrix(config.model.teacher, config.teacher.dtype),
            config.run.seed,
            form=facts.form,
        )

    def rounds(self) -> Iterator[Round]:
        """Trains round by round; yields each round's figures."""
        per_round, steps, schedule = self.config.rollout.prompts_per_round, 0, self.schedule
        total_steps = schedule.steps_before(schedule.rounds)
        for round_ in range(schedule.rounds):
            started = time.perf_counter()
            indices = range(round_ * per_round, min((round_ + 1) * per_round, schedule.total))
            requests = [rollout_request(self.config, self.order, index) for index in indices]
            self.student.eval()
            trajectories, stats = self.decoder.decode(requests, round_)
            decoded_at = time.perf_counter()
            how = self.config.teacher
            targets = score(self.teacher, trajectories, how.targets, how.top_k, how.batch_tokens)
            scored = [ScoredTrajectory(t, target) for t, target in zip(trajectories, targets, strict=True)]
            scored_at = time.perf_counter()
            losses = []
            for pass_number, places in schedule.batches(round_, len(scored)):
                rate = learning_rate(steps, total_steps, self.config.learner.optimizer)
                batch = [scored[place] for place in places]
                losses.append(self.step(batch, batch[0], rate, pass_number).loss)
                steps += 1
            ended_at = time.perf_counter()
            yield Round(
                losses,
                stats.response_tokens,
                ended_at - started,
                decoded_at - started,
                scored_at - decoded_at,
                ended_at - scored_at,
            )
