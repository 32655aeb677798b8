"""Rounds and steps of a run, shares of a batch, learning rate. `pytest tests/learner/test_schedule.py`"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from opdlm.common.config.schema import ObjectiveConfig, OptimizerConfig
from opdlm.common.samples import SampleRef
from opdlm.learner.schedule import TrainingSchedule, learning_rate, share_by_work, training_work


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_schedule_covers_every_sample_once_per_pass(passes) -> None:
    schedule = TrainingSchedule(total=23, prompts_per_round=10, batch_size=4, seed=0, passes=passes)
    assert schedule.rounds == 3
    sizes = [10, 10, 3]
    steps = 0
    for r, size in enumerate(sizes):
        assert schedule.steps_before(r) == steps
        batches = list(schedule.batches(r, size))
        orders = [[p for number, places in batches if number == n for p in places] for n in range(passes)]
        assert [sorted(order) for order in orders] == [list(range(size))] * passes
        assert size < 10 or len({tuple(order) for order in orders}) == passes, "each pass has an order of its own"
        assert all(len(places) <= 4 for _, places in batches)
        steps += len(batches)
    assert schedule.steps_before(3) == steps == 7 * passes


def test_learning_rate() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=5, min_lr_ratio=0.1)
    rates = [learning_rate(s, 105, config) for s in range(106)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[105] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))
    assert learning_rate(99, 105, OptimizerConfig(lr=1.0, schedule="constant")) == 1.0


@pytest.mark.parametrize(("states", "expected"), [("one_state_per_block", [5 + 2 * 7, 3]), ("all_states", [40, 3])])
def test_work_counts_the_clean_half_and_the_noisy_copies(states, expected) -> None:
    samples = [SampleRef("group", place, *lengths) for place, lengths in enumerate([(5, 7), (3, 0)])]
    assert training_work(samples, ObjectiveConfig(selection=states), block_size=4) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 17])
def test_every_sample_is_in_one_share_and_no_rank_has_much_more_work(count, ranks) -> None:
    rng = np.random.default_rng(count * ranks)
    places, work = rng.permutation(40)[:count].tolist(), rng.lognormal(5, 0.8, 40).tolist()
    shares = share_by_work(places, work, ranks)
    assert sorted(place for share in shares for place in share) == sorted(places)
    done = [sum(work[place] for place in share) for share in shares]
    smallest = min(work[place] for place in places)
    assert max(done) - min(done) <= max(work[place] for place in places)
    assert len(places) < ranks or min(done) >= smallest, "a rank has nothing to do"
    for share, total in zip(shares, done, strict=True):  # without its last sample a rank had the least work of all
        assert not share or total - work[share[-1]] <= min(done) + 1e-9


def test_ranks_have_about_equal_work() -> None:
    """64 responses, whose lengths have a long tail, for 8 ranks: compared with dealing them out in turn."""
    rng, in_turn, by_work = np.random.default_rng(0), [], []
    for _ in range(50):
        work = rng.lognormal(6, 0.8, 64).tolist()
        mean = sum(work) / 8
        in_turn.append(max(sum(work[rank::8]) for rank in range(8)) / mean)
        by_work.append(max(sum(work[p] for p in share) for share in share_by_work(range(64), work, 8)) / mean)
    assert np.mean(in_turn) > 1.4
    assert np.mean(by_work) < 1.05


def test_a_long_sample_has_a_rank_for_itself() -> None:
    """It does not share its rank with as many short ones as the other rank has."""
    assert share_by_work([0, 1, 2, 3, 4, 5], [10, 2, 2, 2, 2, 2], 2) == [[0], [1, 2, 3, 4, 5]]


def test_samples_without_work_are_shared_too() -> None:
    assert share_by_work([3, 1, 2], [0.0] * 4, 2) == [[3, 2], [1]]
