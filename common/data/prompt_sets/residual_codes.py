"""Short codes for things that are alike: residual k-means, a code of several letters from coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 30


def residual_codes(features: np.ndarray, sizes: Sequence[int], seed: int) -> np.ndarray:
    """Gives each thing a code of its own.

    Each letter is the nearest of that many means, and the next letter describes what is left. Two things that would
    have the same code differ in the last letter: the second one takes the next nearest mean that is free.

    Args:
        features: `[n, d]`.
        sizes: number of values of each letter.

    Returns: `[n, len(sizes)]` int64, all rows different.

    Raises:
        ValueError: more things share all letters but the last than the last has values.
    """
    left, codes = features.astype(np.float64), np.zeros((len(features), len(sizes)), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for letter, size in enumerate(sizes):
        means = _means(left, size, rng)
        distances = _distances(left, means)
        if letter < len(sizes) - 1:
            most = int(np.prod(sizes[letter + 1 :]))
            codes[:, letter] = _assigned(distances, codes[:, :letter], most)
        else:
            codes[:, letter] = _assigned(distances, codes[:, :letter], 1)
        left = left - means[codes[:, letter]]
    return codes


def _assigned(distances: np.ndarray, prefix: np.ndarray, most: int) -> np.ndarray:
    """The nearest mean of each thing, but no mean more than `most` times among things of one prefix, nearest first."""
    taken: dict[tuple[int, ...], int] = {}
    chosen = np.zeros(len(distances), dtype=np.int64)
    for thing in np.argsort(distances.min(1), kind="stable"):
        for mean in np.argsort(distances[thing], kind="stable"):
            key = (*prefix[thing].tolist(), int(mean))
            if taken.get(key, 0) < most:
                taken[key] = taken.get(key, 0) + 1
                chosen[thing] = mean
                break
        else:
            raise ValueError(f"{len(distances)} things are too many for the letters that are left")
    return chosen


def _means(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Lloyd's algorithm from means that are chosen far apart (k-means++)."""
    means = values[rng.integers(len(values))][None]
    for _ in range(count - 1):
        nearest = _distances(values, means).min(1)
        weights = nearest / nearest.sum() if nearest.sum() > 0 else np.full(len(values), 1 / len(values))
        means = np.concatenate([means, values[rng.choice(len(values), p=weights)][None]])
    for _ in range(_ROUNDS):
        nearest_mean = _distances(values, means).argmin(1)
        means = np.stack(
            [values[nearest_mean == i].mean(0) if (nearest_mean == i).any() else means[i] for i in range(count)]
        )
    return means


def _distances(values: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Squared distances `[n, means]`."""
    return ((values[:, None] - means[None]) ** 2).sum(-1)
