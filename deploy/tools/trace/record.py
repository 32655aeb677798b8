"""Records the denoising steps for `opdlm trace`: top tokens of student and teacher, and their divergence.

Distributions over the vocabulary exist for one step of one block only. A few numbers per masked position are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opdlm.actors.rollout.observation import StepObservation
from opdlm.common.tensors import array_to_tensor
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import HiddenTargets, Trajectory
from opdlm.learner.losses import forward_kl


class Recorder:
    """Observer of a decoder that decodes known trajectories a second time.

    The teacher's distribution at a position depends on the clean prefix (METHOD.md section 3), which inside a block is
    known only when the block is finished. So the prompts are decoded and scored first, and then decoded again with this
    observer.

    Args:
        trajectories: what the decoder will decode again, with distinct indices.
        targets: the teacher's hidden states of each, `[R, D]`.
        teacher_head: the teacher's output matrix, `[.., D] -> [.., V]`.
        mask_id: the student's mask token.
        tokens: the tokens that teacher and student share.
        top: how many of the likeliest tokens are kept at each position.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        targets: Sequence[HiddenTargets],
        teacher_head: torch.nn.Linear,
        mask_id: int,
        tokens: TokenIds,
        top: int,
    ) -> None:
        self._trajectories = {t.index: t for t in trajectories}
        self._hidden = {t.index: target.hidden for t, target in zip(trajectories, targets, strict=True)}
        self._head = teacher_head
        self._mask_id = mask_id
        self._tokens = tokens
        self._holes = torch.tensor(sorted(tokens.holes), dtype=torch.int64)
        self._top = min(top, len(tokens))
        self.steps: dict[int, list[dict[str, Any]]] = {t.index: [] for t in trajectories}
        """By index, the denoising steps in order: `step`, `start` (position of the block), `count` (what the block has
        to reveal), `at` (one entry per mask).

        An entry: [response position, candidate, confidence, 1 if revealed, KL in nats or None, student's top tokens].
        After the end of the response there is no KL, because the teacher scores the response only.
        """
        self.teacher_tops: dict[int, list[list[float]]] = {t.index: [[]] * t.response_length for t in trajectories}
        """By index, the teacher's top tokens at each response position, as [token, probability, token, ...]."""

    def __call__(self, observed: StepObservation) -> None:
        """Records one step of every live sequence."""
        for row, index in enumerate(observed.index):
            trajectory = self._trajectories[index]
            columns = observed.masked[row].nonzero()[:, 0]
            response_positions = observed.positions[row, columns] - len(trajectory.prompt_ids)
            logits = observed.logits[row, columns]
            student_tops = likeliest(logits.log_softmax(-1), self._top)
            kl = self._divergences(index, response_positions, logits, observed.mask_logit[row, columns])
            at = [
                [
                    position,
                    int(observed.candidates[row, column]),
                    round(float(observed.confidence[row, column]), 4),
                    int(observed.revealed[row, column]),
                    kl[i] if i < len(kl) else None,
                    student_tops[i],
                ]
                for i, (position, column) in enumerate(zip(response_positions.tolist(), columns.tolist(), strict=True))
            ]
            start = int(observed.positions[row, 0])
            self.steps[index].append({"step": observed.step[row], "start": start, "count": len(at), "at": at})

    def _divergences(
        self, index: int, positions: torch.Tensor, logits: torch.Tensor, mask_logit: torch.Tensor
    ) -> list[float]:
        """KL(teacher || student) in nats at the `positions` that are inside the response; they are in rising order.

        The softmax is over the tokens of teacher and student, as in the loss (learner/targets.py): it includes the mask
        token's own logit if the teacher has that token, but not if conversion added it.
        """
        inside = int((positions < len(self._hidden[index])).sum())
        if inside == 0:
            return []
        student = logits[:inside].clone()
        student[:, self._mask_id] = mask_logit[:inside]
        teacher = self._teacher(index, positions[:inside])
        return [round(value, 6) for value in forward_kl(teacher, self._over_tokens(student)).tolist()]

    def _teacher(self, index: int, positions: torch.Tensor) -> torch.Tensor:
        """The teacher's log-probabilities `[n, V]` at positions of the response, whose likeliest tokens it keeps."""
        states = array_to_tensor(self._hidden[index][positions.numpy()]).to(self._head.weight.device)
        teacher = self._over_tokens(self._head(states).float().cpu())
        for position, tops in zip(positions.tolist(), likeliest(teacher, self._top), strict=True):
            self.teacher_tops[index][position] = tops
        return teacher

    def _over_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[n, V]`, where V ends with the last shared token; -1e30 at a row that no token has."""
        return logits[:, : self._tokens.end].index_fill(1, self._holes, -1e30).log_softmax(-1)


def likeliest(log_probabilities: torch.Tensor, count: int) -> list[list[float]]:
    """`[n, V]` -> for each position [token, probability, token, ...], the likeliest token first."""
    values, tokens = log_probabilities.topk(count, dim=-1)
    probabilities = np.round(values.exp().numpy().astype(np.float64), 4)
    return [
        [number for pair in zip(row.tolist(), chances.tolist(), strict=True) for number in pair]
        for row, chances in zip(tokens, probabilities, strict=True)
    ]


def block_records(trajectory: Trajectory, steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps of one trajectory by block, with each block's totals.

    `mean_kl`: in nats, over the masked positions of all its steps that have a KL. `tokens_per_step`: tokens of the
    block per denoising step, without those after the end of the response.
    """
    blocks: list[dict[str, Any]] = []
    for step in steps:
        if not blocks or blocks[-1]["start"] != step["start"]:
            blocks.append({"start": step["start"], "first": step["at"][0][0], "count": step["count"], "steps": []})
        blocks[-1]["steps"].append({"step": step["step"], "at": step["at"]})
    for block in blocks:
        inside = min(block["first"] + block["count"], trajectory.response_length) - block["first"]
        block["tokens_per_step"] = round(max(inside, 0) / len(block["steps"]), 4)
        block["mean_kl"] = mean_kl(block["steps"])
    return blocks


def mean_kl(steps: Sequence[dict[str, Any]]) -> float | None:
    """Mean KL in nats over the positions of all steps that have one; None where none has."""
    values = [mask[4] for step in steps for mask in step["at"] if mask[4] is not None]
    return round(sum(values) / len(values), 6) if values else None
