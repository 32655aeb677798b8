"""Where the sequences of the slots lie in the cache: one place after another, in the order of the slots.

A sequence grows inside its place. When one has outgrown its place, it and the slots after it get new places; when these
do not fit into what is left of the cache, all slots do. Slots that get new places are sorted, longest first. So the
long sequences, which outgrow their places rarely, lie in front and are moved rarely, and neighbours are of like length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SLACKS = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""By how much of its length a place may be longer than its sequence; the first that fits is taken. The last one bounds
how often sequences are moved, so a full cache holds one position in 17 for growth."""
LEAST_SLACK = _SLACKS[-1]
GROWING_SLACK = 1 / 4
"""The least slack in a cache that can be enlarged instead."""
ADMISSION_SLACK = 1 / 8
"""A sequence begins only if all would fit with this slack, so that it is not put back at once."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """New places of the slots from `first` on."""

    first: int
    order: np.ndarray  # [n - first] int64, the slot that moves to each of these
    bases: np.ndarray  # [n - first] int64, the position at which its place begins
    widths: np.ndarray  # [n - first] int64, the positions of its place


def widths_of(needs: np.ndarray, limits: np.ndarray, room: int, least: float = LEAST_SLACK) -> np.ndarray | None:
    """Positions of each slot's place: as many as fit, at least what it needs; None if they do not fit.

    Args:
        needs: `[n]` int64, positions of each sequence, to the end of its current block.
        limits: `[n]` int64, positions of each sequence if it gets as long as it may.
        room: positions for all of them.
        least: the least slack; no place is longer than its limit.
    """
    if limits.sum() <= room:
        return limits
    for slack in _SLACKS:
        widths = np.minimum(limits, needs + np.ceil(needs * slack).astype(np.int64))
        if slack >= least and widths.sum() <= room:
            return widths
    return None


def arrange(
    bases: np.ndarray,
    widths: np.ndarray,
    needs: np.ndarray,
    limits: np.ndarray,
    room: int,
    least: float,
    from_first: bool,
) -> Arrangement | None:
    """New places for the slots from the first one that has outgrown its place, or for all; None if they do not fit.

    Args:
        bases, widths: `[n]` int64, the places so far, one after another; the width of a slot without a place is 0.
        needs, limits, least: as for `widths_of`.
        room: positions of the cache.
        from_first: whether all slots get new places in any case.
    """
    outgrown = np.flatnonzero(needs > widths)
    for first in (0,) if from_first or not outgrown.size else dict.fromkeys((int(outgrown[0]), 0)):
        begin = int(bases[first - 1] + widths[first - 1]) if first else 0
        order = first + np.argsort(-needs[first:], kind="stable")
        new = widths_of(needs[order], limits[order], room - begin, least)
        if new is not None:
            return Arrangement(first, order, begin + np.cumsum(new) - new, new)
    return None
