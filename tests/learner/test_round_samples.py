"""Fetching a round's samples, also after their data was lost. `pytest tests/learner/test_round_samples.py`"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from ray.exceptions import ObjectLostError

from opdlm.common.errors import OpdlmError
from opdlm.common.samples import SampleRef
from opdlm.common.types import LogitsTargets, ScoredTrajectory
from opdlm.learner.round_samples import RoundSamples
from tests.tiny import trajectory

FIRST = 30


def _scored(index: int) -> ScoredTrajectory:
    made = dataclasses.replace(trajectory([5, 6], [7, 8], [1, 2]), index=index)
    return ScoredTrajectory(made, LogitsTargets(np.zeros((2, 4), np.float32)))


class Store:
    """Stands in for the queue client. References are names; those in `lost` have no data."""

    def __init__(self, groups: dict[str, list[int]]) -> None:
        self.groups = {name: [_scored(i) for i in indices] for name, indices in groups.items()}
        self.lost: set[str] = set()
        self.fetched: list[str] = []
        self.replaced: list[int] = []

    def wait_for(self, references, what):
        one = isinstance(references, str)
        for name in [references] if one else references:
            self.fetched.append(name)
            if name in self.lost:
                raise ObjectLostError(name, "", "")
        return self.groups[references] if one else [self.groups[name] for name in references]

    def remade_sample(self, index: int, lost: SampleRef) -> SampleRef:
        self.replaced.append(index)
        name = f"again {index}"
        self.groups[name] = [_scored(index)]
        return SampleRef(name, 0, 2, 2)


def _round(store: Store) -> RoundSamples:
    places = [("small", 0), ("small", 1), ("large", 0), ("small", 2)]
    return RoundSamples([SampleRef(group, place, 2, 2) for group, place in places], FIRST, store)


def _indices(samples) -> list[int]:
    return [sample.trajectory.index for sample in samples]


@pytest.fixture
def store() -> Store:
    return Store({"small": [30, 31, 33], "large": [32]})


def test_a_shared_reference_is_fetched_once_and_a_large_sample_is_not_kept(store) -> None:
    samples = _round(store)
    assert _indices(samples.fetch([3, 2])) == [33, 32]
    assert _indices(samples.fetch([2, 0])) == [32, 30]
    assert _indices(samples.fetch([1])) == [31]
    assert store.fetched.count("small") == 1
    assert store.fetched.count("large") == 2


def test_lost_samples_are_made_again_one_by_one(store) -> None:
    samples = _round(store)
    store.lost.add("small")
    assert _indices(samples.fetch([0, 2, 3])) == [30, 32, 33]
    assert store.replaced == [30, 33]  # 31 is lost too, but this rank did not need it
    assert _indices(samples.fetch([3, 1])) == [33, 31]
    assert store.replaced == [30, 33, 31]


def test_a_fetched_group_is_not_fetched_again_when_it_is_lost(store) -> None:
    samples = _round(store)
    samples.fetch([0])
    store.lost |= {"small", "large"}
    assert _indices(samples.fetch([3, 2])) == [33, 32]
    assert store.replaced == [32]


def test_a_sample_under_another_index_is_refused(store) -> None:
    store.groups["small"].reverse()
    with pytest.raises(OpdlmError, match="sample 33 came where sample 30 belongs"):
        _round(store).fetch([0])
