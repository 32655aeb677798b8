"""Which questions are kept for evaluation: a rule that the built-in prompts and the knowledge questions share.

A hash of a question's key says it: 3 of 10 keys are held out. No built-in prompt has a held-out key, and a knowledge
question of a kind that the prompts also have (opposites, sums, facts) has a held-out one, so no question is in both.
Kinds in `HELD_OUT_KINDS` are kept for evaluation as a whole.
"""

from __future__ import annotations

import hashlib
import re

HELD_OUT_KINDS = frozenset({"capitals", "languages", "continents"})
"""Kinds of questions that no built-in prompt asks: the capital, the languages and the continent of a country."""

_BUCKETS, _HELD_OUT_BUCKETS = 10, 3


def is_held_out(key: str) -> bool:
    """Whether a key is kept for evaluation, so that no prompt to train on may be about it.

    Args:
        key: what a question is about, without its words: `hot` for its opposite, `7+5` for a sum, `legs of a spider`
            for a fact. Case, spaces and punctuation at its ends do not matter.
    """
    plain = re.sub(r"\s+", " ", key).strip(" .?!").casefold()
    return int(hashlib.sha256(plain.encode()).hexdigest(), 16) % _BUCKETS < _HELD_OUT_BUCKETS
