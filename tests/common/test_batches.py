"""Sequences cut into batches. `pytest tests/common/test_batches.py`"""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from opdlm.common.batches import batches_by_length


def _cheapest(lengths: list[int], batch_tokens: int, call_tokens: int) -> int:
    """What the best of all ways to cut the sorted lengths costs."""
    ordered, count = sorted(lengths, reverse=True), len(lengths)
    costs = []
    for number in range(count):
        for borders in combinations(range(1, count), number):
            batches = [ordered[a:b] for a, b in pairwise([0, *borders, count])]
            if all(len(batch) == 1 or len(batch) * batch[0] <= batch_tokens for batch in batches):
                costs.append(sum(len(batch) * batch[0] + call_tokens for batch in batches))
    return min(costs)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 100), st.integers(0, 60))
def test_batches_hold_every_item_once_and_cost_as_little_as_possible(
    lengths: list[int], batch_tokens: int, call_tokens: int
) -> None:
    batches = batches_by_length(lengths, batch_tokens, call_tokens)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    padded = [len(batch) * lengths[batch[0]] for batch in batches]
    assert all(tokens <= batch_tokens or len(batch) == 1 for tokens, batch in zip(padded, batches, strict=True))
    assert sum(padded) + call_tokens * len(batches) == _cheapest(lengths, batch_tokens, call_tokens)


def test_one_long_sequence_does_not_pad_the_short_ones() -> None:
    lengths = [40, 4000, 36, 44]
    assert batches_by_length(lengths, 16384) == [[1], [3, 0, 2]]
    assert batches_by_length([40, 100, 36, 44], 16384) == [[1, 3, 0, 2]], "a forward costs more than a little padding"


def test_no_items_are_no_batches() -> None:
    assert batches_by_length([], 10) == []
