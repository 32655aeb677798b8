"""The form of a student: what its clean tokens attend to, and at which position a token is predicted (METHOD.md 1, 11).

The paper's form has block-causal context and no logit shift. The other three start closer to the teacher. The form
belongs to the weights: config.json of a student names it, and decoder, training rows and exported code follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Context = Literal["block_causal", "causal"]


@dataclass(frozen=True, slots=True)
class StudentForm:
    """How a student reads its context and where it predicts; the defaults are the paper's."""

    logit_shift: bool = False
    """Whether the logits at position i - 1 predict token i, as an autoregressive model's do. A block's first token then
    is predicted at the last token before the block, in its clean state."""
    context: Context = "block_causal"
    """What a clean token sees. `block_causal`: all earlier blocks and its whole block. `causal`: itself and the tokens
    before it, as in the teacher. A noisy token always sees its whole block."""

    @property
    def causal(self) -> bool:
        """Whether clean tokens attend causally."""
        return self.context == "causal"

    def replaced(self, logit_shift: bool | None, context: Context | None) -> StudentForm:
        """This form, with what is not None in its place."""
        shift = self.logit_shift if logit_shift is None else logit_shift
        return StudentForm(shift, self.context if context is None else context)

    def __str__(self) -> str:
        """`logit shift, causal context`, for tables and errors."""
        return f"{'' if self.logit_shift else 'no '}logit shift, {self.context.replace('_', '-')} context"


PAPER_FORM = StudentForm()
"""The paper's: block-causal context, no logit shift."""
