"""Cuts sequences into groups of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def in_groups(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Cuts items, in their order, into lists of `size` items; the last list may be shorter."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yields batches of indices, longest item first. A batch padded to its longest item has at most `batch_tokens`.

    An item that is longer than `batch_tokens` gets a batch of its own.

    Args:
        lengths: length of each item, in tokens.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
