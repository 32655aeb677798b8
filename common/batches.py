"""Groups of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def in_groups(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Cuts items, in their order, into lists of so many; the last may be shorter."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Groups indices, longest first, so that a group padded to its longest stays within `batch_tokens`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
