"""An answer that appears as it is unmasked: what each denoising step of the only sequence has revealed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.text import Text

from opdlm.actors.rollout.observation import StepObservation
from opdlm.deploy.evaluate.generation import Model
from opdlm.deploy.tools.generate import MASK_SIGN


class Unmasking:
    """Shows the text of earlier blocks, and the current block with a sign for each mask.

    Args:
        prompt_tokens: tokens of the prompt, which are not shown.
        show: called after each denoising step.
    """

    def __init__(self, model: Model, prompt_tokens: int, show: Callable[[Text], None]) -> None:
        self._model, self._first, self._show = model, prompt_tokens, show
        self._tokens: dict[int, int | None] = {}
        """By position, its token; None: a mask."""

    def __call__(self, observed: StepObservation) -> None:
        """Takes one step."""
        for column, position in enumerate(observed.positions[0].tolist()):
            if bool(observed.revealed[0, column]):
                self._tokens[position] = int(observed.candidates[0, column])
            elif position >= self._first:
                self._tokens[position] = None if observed.masked[0, column] else int(observed.tokens[0, column])
        self._show(self.text())

    def text(self) -> Text:
        """What there is of the answer, up to the first end-of-sequence token with nothing but tokens before it."""
        text, known = Text(), list[int]()
        for position in sorted(self._tokens):
            token = self._tokens[position]
            if token is None:
                text.append(self._plain(known))
                text.append(MASK_SIGN, style="dim")
                known = []
            elif token in self._model.facts.eos_ids:
                break
            else:
                known.append(token)
        text.append(self._plain(known))
        return text

    def _plain(self, ids: list[int]) -> str:
        return self._model.text(np.array(ids, dtype=np.int32)) if ids else ""
