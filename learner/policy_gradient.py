"""The policy gradient at single tokens: ratio, clipped surrogate, distance from a reference (METHOD.md section 7).

Each position is one response token in the state in which the rollout revealed it. Its log-probability is taken at the
temperature of the rollout, over the tokens that the decoder may draw: neither the mask nor a row that no token has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.types import PolicyTargets, ScoredTrajectory
from opdlm.learner.rows import Row
from opdlm.learner.targets import PositionTargets


@dataclass(frozen=True, slots=True)
class Draws:
    """What the decoder draws tokens from."""

    temperature: float
    """Of the rollouts."""
    never: tuple[int, ...]
    """Rows of the vocabulary that are never drawn: the mask, and rows that no token has."""


@dataclass(frozen=True, slots=True)
class PolicyPositions:
    """The policy gradient's side of the loss at N positions: what `PositionTargets` is to a distillation."""

    token_ids: torch.Tensor
    """`[N]` int64, the tokens of the response."""
    old_logprobs: torch.Tensor
    """`[N]` float32, under the distributions that they were drawn from."""
    advantages: torch.Tensor
    """`[N]` float32."""
    never: torch.Tensor
    """Rows of the vocabulary that are never drawn, int64."""
    temperature: float
    """Of the rollout."""
    new_logprobs: torch.Tensor
    """`[N]` float32, written by the forward that takes the loss."""
    reference_logprobs: torch.Tensor | None = None
    """`[N]` float32; None where the objective has no `kl_beta`."""
    teacher: PositionTargets | None = None
    """The teacher's side at the same positions; None where the objective has no `opd_weight`."""

    def __getitem__(self, part: slice) -> PolicyPositions:
        """The same at some of the positions; `new_logprobs` stays a view of this one's."""
        teacher = None if self.teacher is None else self.teacher[part]
        return replace(self._each(lambda tensor: tensor[part]), teacher=teacher)

    def to(self, device: torch.device) -> PolicyPositions:
        """The same on another device."""
        teacher = None if self.teacher is None else self.teacher.to(device)
        return replace(self._each(lambda tensor: tensor.to(device)), never=self.never.to(device), teacher=teacher)

    def losses_with_gradient(
        self,
        student_logits: torch.Tensor,
        weights: torch.Tensor,
        objective: ObjectiveConfig,
        scratch: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss at each position `[N]`, and the gradient of `sum(weights * losses)` by the logits, `[N, V']`.

        Both are float32. Runs outside autograd and may overwrite the logits. `scratch`: as for `PositionTargets`.
        """
        if self.teacher is None:
            return self._policy(student_logits, weights, objective)
        share = objective.opd_weight
        distances, towards_teacher = self.teacher.losses_with_gradient(
            student_logits.clone(), share * weights, objective, scratch
        )
        losses, gradient = self._policy(student_logits, weights, objective)
        return losses + share * distances, gradient.add_(towards_teacher)

    def _policy(
        self, student_logits: torch.Tensor, weights: torch.Tensor, objective: ObjectiveConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy gradient's part of `losses_with_gradient`."""
        logprobs = student_logits.float().div_(self.temperature)
        logprobs.index_fill_(1, self.never, float("-inf"))
        logprobs.sub_(logprobs.logsumexp(-1, keepdim=True))
        new = logprobs.gather(1, self.token_ids[:, None]).squeeze(1)
        self.new_logprobs.copy_(new)
        losses, by_new = self._losses(new, objective)
        # The derivative of a token's log-probability by the logits is (1 at the token - the probabilities) / T.
        scale = (weights * by_new / self.temperature)[:, None]
        gradient = logprobs.exp_().mul_(-scale)
        return losses, gradient.scatter_add_(1, self.token_ids[:, None], scale)

    def scratch_for(self, positions: int) -> torch.Tensor | None:
        """Memory that the teacher's side can use; None without one."""
        return None if self.teacher is None else self.teacher.scratch_for(positions)

    def ratio(self) -> torch.Tensor:
        """rho, `[N]`: the tokens' probabilities now, divided by those that they were drawn with."""
        return (self.new_logprobs - self.old_logprobs).exp()

    def is_clipped(self, objective: ObjectiveConfig) -> torch.Tensor:
        """`[N]` bool, where the clipped term of the surrogate is the smaller one."""
        plain, clipped = self._terms(self.ratio(), objective)
        return clipped < plain

    def distance(self) -> torch.Tensor:
        """k3, `[N]`: the estimate of KL(student || reference); 0 without a reference."""
        if self.reference_logprobs is None:
            return torch.zeros_like(self.new_logprobs)
        d = self.new_logprobs - self.reference_logprobs
        return torch.expm1(-d) + d

    def figures(self, objective: ObjectiveConfig, weights: torch.Tensor) -> dict[str, float]:
        """Means over the tokens of an optimizer step, or this micro-batch's part of them.

        Args:
            weights: `[N]` float32, on the CPU, the weight of each position in the whole step.

        Returns: `ratio`, `clipped_share`, `logprob_change` (of |l_new - l_old|, nats), `reference_kl` (nats),
            `advantage_size` (of |A|).
        """
        change = (self.new_logprobs - self.old_logprobs).abs()
        values = self.ratio(), self.is_clipped(objective).float(), change, self.distance(), self.advantages.abs()
        names = "ratio", "clipped_share", "logprob_change", "reference_kl", "advantage_size"
        return {name: float((of.cpu() * weights).sum()) for name, of in zip(names, values, strict=True)}

    def _losses(self, new: torch.Tensor, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses, and their derivatives by the new log-probabilities; `[N]` both."""
        plain, clipped = self._terms((new - self.old_logprobs).exp(), objective)
        losses, by_new = -torch.minimum(plain, clipped), -torch.where(plain <= clipped, plain, 0.0)
        if self.reference_logprobs is not None:
            losses = losses + objective.kl_beta * self.distance()
            by_new = by_new - objective.kl_beta * torch.expm1(self.reference_logprobs - new)
        return losses, by_new

    def _terms(self, ratio: torch.Tensor, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
        clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
        return ratio * self.advantages, clipped * self.advantages

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PolicyPositions:
        return replace(
            self,
            token_ids=change(self.token_ids),
            old_logprobs=change(self.old_logprobs),
            advantages=change(self.advantages),
            new_logprobs=change(self.new_logprobs),
            reference_logprobs=None if self.reference_logprobs is None else change(self.reference_logprobs),
        )


def is_left_out(scored: ScoredTrajectory) -> bool:
    """Whether the rewards of its group are all equal, so that it teaches nothing."""
    return isinstance(scored.targets, PolicyTargets) and scored.targets.advantage is None


def gather_policy(rows: Sequence[Row], draws: Draws, teacher: PositionTargets | None = None) -> PolicyPositions:
    """The policy gradient's side at the loss positions of the rows, in their order.

    Args:
        rows: of trajectories with `PolicyTargets` and `reveal_logprob`.
        teacher: the teacher's side at the same positions, for `objective.opd_weight`.
    """
    tokens, old, advantages, reference = [], [], [], []
    for row in rows:
        trajectory, targets, places = row.scored.trajectory, row.scored.targets, row.loss_positions
        assert isinstance(targets, PolicyTargets), "reward actors give rollouts of `rl` their advantages"
        assert targets.advantage is not None, "groups left out make no rows"
        assert trajectory.reveal_logprob is not None, "the decoder keeps log-probabilities for `rl`"
        tokens.append(trajectory.response_ids[places].astype(np.int64))
        old.append(trajectory.reveal_logprob[places])
        advantages.append(np.full(len(places), targets.advantage, dtype=np.float32))
        if targets.reference_logprobs is not None:
            reference.append(targets.reference_logprobs[places])
    old_logprobs = torch.from_numpy(np.concatenate(old))
    return PolicyPositions(
        torch.from_numpy(np.concatenate(tokens)),
        old_logprobs,
        torch.from_numpy(np.concatenate(advantages)),
        torch.tensor(draws.never, dtype=torch.int64),
        draws.temperature,
        torch.empty_like(old_logprobs),
        torch.from_numpy(np.concatenate(reference)) if reference else None,
        teacher,
    )
