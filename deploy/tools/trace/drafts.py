"""Records the steps of lossless decoding for `opdlm trace`: what became of each draft."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from opdlm.actors.rollout.observation import StepObservation
from opdlm.deploy.tools.trace.record import Recorder, likeliest


class _Draft(NamedTuple):
    token: int
    confidence: float
    kl: float
    tops: list[float]


class DraftRecorder(Recorder):
    """A `Recorder` of the strategy `verified`. Each step is a block of its own: the tokens that are known by it.

    An entry of `at` has a seventh value: the draft that was wrong there, where the clean path's own token took its
    place; else None. KL and top tokens are always those of the draft, confidence is that of the token. Entries that are
    not revealed are drafts behind a wrong one. Nothing behind the end of the response is recorded.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._drafts: dict[int, dict[int, _Draft]] = {}
        """By index and response position, what the last step drafted."""

    def __call__(self, observed: StepObservation) -> None:
        """Records one step of every live sequence."""
        for row, index in enumerate(observed.index):
            trajectory, drafts = self._trajectories[index], self._drafts.pop(index, {})
            at: list[list[Any]] = []
            right = int(observed.revealed[row].sum()) - 1
            for column, position in enumerate((observed.positions[row] - len(trajectory.prompt_ids)).tolist()):
                draft = drafts.get(position)
                if position >= trajectory.response_length or (column > right and draft is None):
                    break
                if column == right:
                    self._teacher(index, torch.tensor([position]))
                    token, chance = int(observed.candidates[row, column]), float(observed.confidence[row, column])
                    kl, tops, wrong = (draft.kl, draft.tops, draft.token) if draft else (None, [], None)
                    at.append([position, token, round(chance, 4), 1, kl, tops, wrong])
                elif draft is not None:
                    at.append(
                        [position, draft.token, draft.confidence, int(column < right), draft.kl, draft.tops, None]
                    )
            start, count = int(observed.positions[row, 0]), sum(entry[3] for entry in at)
            self.steps[index].append({"step": observed.step[row], "start": start, "count": count, "at": at})
            self._drafts[index] = self._drafted(observed, row)

    def _drafted(self, observed: StepObservation, row: int) -> dict[int, _Draft]:
        """By response position, the drafts of the next step that are inside the response."""
        assert observed.drafts is not None, "the strategy is `verified`"
        index, drafts = observed.index[row], observed.drafts
        positions = drafts.positions[row] - len(self._trajectories[index].prompt_ids)
        kl = self._divergences(index, positions, drafts.logits[row], drafts.mask_logit[row])
        said = drafts.logits[row].log_softmax(-1)
        chances = said.gather(1, drafts.tokens[row][:, None])[:, 0].exp().tolist()
        figures = zip(drafts.tokens[row].tolist(), chances, kl, likeliest(said, self._top), strict=False)
        return {
            position: _Draft(token, round(chance, 4), divergence, tops)
            for position, (token, chance, divergence, tops) in zip(positions.tolist(), figures, strict=False)
        }
