"""Cuts sequences into groups of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

CALL_TOKENS = 512
"""What a forward costs beside its tokens, as a number of tokens: it reads all weights and launches all kernels."""


def in_groups(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Cuts items, in their order, into lists of `size` items; the last list may be shorter."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def batches_by_length(lengths: Sequence[int], batch_tokens: int, call_tokens: int = CALL_TOKENS) -> list[list[int]]:
    """Cuts items, sorted by length, into the batches that cost least: padding costs something, another batch does too.

    Args:
        lengths: length of each item, in tokens.
        batch_tokens: most tokens of a batch that is padded to its longest item. An item that is longer gets a batch of
            its own.
        call_tokens: what a batch costs beside its tokens, as a number of tokens.

    Returns: batches of indices, longest item first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes, count = np.array([lengths[i] for i in order]), len(lengths)
    least, begins = np.zeros(count + 1), [0] * (count + 1)  # of the first items: what they cost, where the last begins
    for end in range(1, count + 1):
        padded = (end - np.arange(end)) * sizes[:end]
        allowed = (padded <= batch_tokens) | (np.arange(end) == end - 1)
        costs = np.where(allowed, least[:end] + padded + call_tokens, np.inf)
        begins[end] = int(costs.argmin())
        least[end] = costs[begins[end]]
    batches, end = [], count
    while end:
        batches.append(order[begins[end] : end])
        end = begins[end]
    return batches[::-1]
