"""Shares of a batch. `pytest tests/learner/test_schedule.py`"""

from __future__ import annotations

import numpy as np
import pytest

from opdlm.learner.schedule import split


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 17])
def test_every_sample_is_in_one_share_and_none_has_many_more(count, ranks) -> None:
    rng = np.random.default_rng(count * ranks)
    places, work = rng.permutation(40)[:count].tolist(), rng.lognormal(5, 0.8, 40).tolist()
    shares = split(places, work, ranks)
    assert sorted(place for share in shares for place in share) == sorted(places)
    assert max(map(len, shares)) <= -(-count // ranks)


def test_burdens_are_even() -> None:
    """Against dealing in turn: the longest rank of 8, of 64 responses whose lengths have a long tail."""
    rng, dealt, balanced = np.random.default_rng(0), [], []
    for _ in range(50):
        work = rng.lognormal(6, 0.8, 64).tolist()
        mean = sum(work) / 8
        dealt.append(max(sum(work[rank::8]) for rank in range(8)) / mean)
        balanced.append(max(sum(work[p] for p in share) for share in split(range(64), work, 8)) / mean)
    assert np.mean(dealt) > 1.4
    assert np.mean(balanced) < 1.05


def test_no_sample_costs_anything() -> None:
    assert split([3, 1, 2], [0.0] * 4, 2) == [[3, 1], [2]]
