"""What a decoder's observer keeps of a step for `opdlm trace`: top tokens of both models and their divergence.

Distributions over the vocabulary live for one step of one block only; what is kept are a few numbers a masked position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opdlm.actors.rollout.observation import StepObservation
from opdlm.common.tensors import array_to_tensor
from opdlm.common.types import HiddenTargets, Trajectory
from opdlm.learner.losses import forward_kl


class Recorder:
    """Observer of a decoder that decodes known trajectories again.

    The teacher's distribution at a position depends on the clean prefix (METHOD.md section 3), and inside a block that
    is not known before the block is done: so first decode, then score, then decode the same again with this watching.

    Args:
        trajectories: what will be decoded; their indices name them.
        targets: the teacher's hidden states of each, `[R, D]`.
        teacher_head: the teacher's output module, `[.., D] -> [.., V]`.
        mask_id: the student's mask token.
        top: tokens kept at a position.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        targets: Sequence[HiddenTargets],
        teacher_head: torch.nn.Linear,
        mask_id: int,
        top: int,
    ) -> None:
        self._trajectories = {t.index: t for t in trajectories}
        self._hidden = {t.index: target.hidden for t, target in zip(trajectories, targets, strict=True)}
        self._head = teacher_head
        self._mask_id = mask_id
        self._top = min(top, teacher_head.out_features)
        self.steps: dict[int, list[dict[str, Any]]] = {t.index: [] for t in trajectories}
        """By index, the denoising steps in order: `step`, `start` (position of the block), `at` (one entry a mask).

        An entry: [response position, candidate, confidence, 1 if revealed, KL in nats or None, student's top tokens].
        There is no KL behind the end of the response: the teacher scores the response only.
        """
        self.teacher_tops: dict[int, list[list[float]]] = {t.index: [[]] * t.response_length for t in trajectories}
        """By index, the teacher's top tokens of each response position, as [token, probability, token, ...]."""

    def __call__(self, view: StepObservation) -> None:
        """Takes one step of every live sequence."""
        for row, index in enumerate(view.index):
            trajectory = self._trajectories[index]
            columns = view.masked[row].nonzero()[:, 0]
            places = view.positions[row, columns] - len(trajectory.prompt_ids)
            logits = view.logits[row, columns]
            student_tops = _tops(logits.log_softmax(-1), self._top)
            kl = self._divergences(index, places, logits, view.mask_logit[row, columns])
            at = [
                [
                    int(place),
                    int(view.candidates[row, column]),
                    round(float(view.confidence[row, column]), 4),
                    int(view.revealed[row, column]),
                    kl[i] if i < len(kl) else None,
                    student_tops[i],
                ]
                for i, (place, column) in enumerate(zip(places.tolist(), columns.tolist(), strict=True))
            ]
            self.steps[index].append({"step": view.step[row], "start": int(view.positions[row, 0]), "at": at})

    def _divergences(
        self, index: int, places: torch.Tensor, logits: torch.Tensor, mask_logit: torch.Tensor
    ) -> list[float]:
        """KL(teacher || student) in nats at those of `places` (rising) that lie inside the response.

        Over the teacher's vocabulary, as the loss has it (learner/targets.py): with the mask token's own logit where
        the teacher has that row, without the row where it was added on conversion.
        """
        hidden = self._hidden[index]
        inside = int((places < len(hidden)).sum())
        if inside == 0:
            return []
        states = array_to_tensor(hidden[places[:inside].numpy()]).to(self._head.weight.device)
        teacher = self._head(states).float().cpu().log_softmax(-1)
        student = logits[:inside].clone()
        student[:, self._mask_id] = mask_logit[:inside]
        student = student[:, : teacher.shape[-1]].log_softmax(-1)
        for place, tops in zip(places.tolist(), _tops(teacher, self._top), strict=False):
            self.teacher_tops[index][place] = tops
        return [round(value, 6) for value in forward_kl(teacher, student).tolist()]


def _tops(log_probabilities: torch.Tensor, count: int) -> list[list[float]]:
    """`[n, V]` -> for each position [token, probability, token, probability, ...], likeliest first."""
    values, tokens = log_probabilities.topk(count, dim=-1)
    probabilities = np.round(values.exp().numpy().astype(np.float64), 4)
    return [
        [number for pair in zip(row.tolist(), chances.tolist(), strict=True) for number in pair]
        for row, chances in zip(tokens, probabilities, strict=True)
    ]


def block_records(trajectory: Trajectory, steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps of one trajectory by block, with each block's totals.

    `mean_kl`: nats, over all masked positions of all its steps that have one. `tokens_per_step`: response tokens of the
    block (none behind the response's end) per denoising step.
    """
    blocks: list[dict[str, Any]] = []
    for step in steps:
        if not blocks or blocks[-1]["start"] != step["start"]:
            blocks.append({"start": step["start"], "first": step["at"][0][0], "count": len(step["at"]), "steps": []})
        blocks[-1]["steps"].append({"step": step["step"], "at": step["at"]})
    for block in blocks:
        inside = min(block["first"] + block["count"], trajectory.response_length) - block["first"]
        block["tokens_per_step"] = round(max(inside, 0) / len(block["steps"]), 4)
        block["mean_kl"] = mean_kl(block["steps"])
    return blocks


def mean_kl(steps: Sequence[dict[str, Any]]) -> float | None:
    """Mean over all positions of all steps that have a KL; None where none has."""
    values = [place[4] for step in steps for place in step["at"] if place[4] is not None]
    return round(sum(values) / len(values), 6) if values else None
