"""Selections of states, plan and learning rate. `pytest tests/learner/test_states.py`"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlm.common.config.schema import LearnerConfig, ObjectiveConfig, OptimizerConfig
from opdlm.common.grid import BlockGrid
from opdlm.learner.rows import build_rows
from opdlm.learner.schedule import TrainingSchedule, learning_rate
from opdlm.learner.states import SELECTIONS, BlockStates
from opdlm.learner.train_step import TrainStep
from tests.golden_files import unscored
from tests.tiny import EOS, MASK, trajectory

steps_of_blocks = st.lists(st.lists(st.integers(1, 5), min_size=4, max_size=4), min_size=1, max_size=4)


@given(steps_of_blocks, st.sampled_from(sorted(SELECTIONS)), st.integers(0, 10**6))
def test_selected_states_were_visited(blocks, selection, seed) -> None:
    """Every block of every row is in one of its visited states (or has nothing masked, where it ran out of states)."""
    reveal = np.concatenate([np.array(b) + 10 * i for i, b in enumerate(blocks)])
    rows = SELECTIONS[selection](BlockStates(reveal, 8, BlockGrid(4)), np.random.default_rng(seed))
    for masked in rows:
        for i in range(len(blocks)):
            block, inside = reveal[4 * i : 4 * i + 4], masked[4 * i : 4 * i + 4]
            visited = [tuple(block >= s) for s in sorted(set(block))]
            if selection == "random_mask":
                assert inside.any()
            elif selection == "one_state_per_block":
                assert tuple(inside) in visited
            else:
                assert tuple(inside) in visited or not inside.any()
    if selection == "all_states":
        assert len(rows) == max(len(set(b)) for b in blocks)
        for i, b in enumerate(blocks):
            states = [tuple(r[4 * i : 4 * i + 4]) for r in rows if r[4 * i : 4 * i + 4].any()]
            assert len(states) == len(set(states)) == len(set(b))


def test_states_are_drawn_uniformly() -> None:
    states = BlockStates(np.array([1, 2, 3, 4]), 4, BlockGrid(4))
    rng = np.random.default_rng(0)
    counts = np.bincount([SELECTIONS["one_state_per_block"](states, rng)[0].sum() for _ in range(4000)])
    assert counts[0] == 0
    assert abs(counts[1:] - 1000).max() < 150


def test_random_mask_ratio_is_uniform_per_block() -> None:
    states = BlockStates(np.arange(1, 65), 64, BlockGrid(64))
    rng = np.random.default_rng(0)
    masked = np.array([SELECTIONS["random_mask"](states, rng)[0].sum() for _ in range(3000)])
    assert masked.min() >= 1
    assert np.allclose(np.quantile(masked, [0.25, 0.5, 0.75]), [16, 32, 48], atol=2.5)


@pytest.mark.parametrize(("exclude", "expected"), [(True, [0, 1]), (False, [0, 1, 2])])
def test_no_loss_past_the_end(exclude, expected) -> None:
    """Position 2 is the end token, 3 and 4 were decoded behind it: seen in the state, never in the loss."""
    one = trajectory([5, 6, 7], [9, 8, EOS, 4, 4], [1, 2, 2, 2, 2], length=3)
    objective = ObjectiveConfig(selection="all_states", exclude_eos=exclude)
    rows = build_rows(unscored(one), BlockGrid(4), objective, MASK, np.random.default_rng(0))
    assert rows[0].loss_positions.tolist() == expected
    noisy = rows[0].input_ids[8:]
    assert noisy.tolist() == [5, 6, 7, MASK, MASK, MASK, MASK, MASK]
    assert rows[0].position_ids.tolist() == [*range(8), *range(8)]
    assert (rows[0].input_ids[rows[0].loss_columns] == MASK).all()


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_plan_covers_every_sample_once_a_pass(passes) -> None:
    plan = TrainingSchedule(total=23, prompts_per_round=10, batch_size=4, seed=0, passes=passes)
    assert plan.rounds == 3
    sizes = [10, 10, 3]
    steps = 0
    for r, size in enumerate(sizes):
        assert plan.steps_before(r) == steps
        batches = list(plan.batches(r, size))
        orders = [[p for number, places in batches if number == pass_ for p in places] for pass_ in range(passes)]
        assert [sorted(order) for order in orders] == [list(range(size))] * passes
        assert size < 10 or len({tuple(order) for order in orders}) == passes, "each has an order of its own"
        assert all(len(places) <= 4 for _, places in batches)
        steps += len(batches)
    assert plan.steps_before(3) == steps == 7 * passes


def test_learning_rate() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=5, min_lr_ratio=0.1)
    rates = [learning_rate(s, 105, config) for s in range(106)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[105] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))
    assert learning_rate(99, 105, OptimizerConfig(lr=1.0, schedule="constant")) == 1.0


def test_a_second_pass_draws_other_states_of_the_same_trajectory() -> None:
    """And the first those that a run of one pass draws."""
    objective = ObjectiveConfig(selection="one_state_per_block", exclude_eos=False)
    step = TrainStep(None, LearnerConfig(), objective, BlockGrid(4), MASK, None, seed=3)
    long = unscored(trajectory([5, 6, 7, 8], [9] * 40, [1 + i % 4 for i in range(40)]))
    rows = [step._rows(long, pass_)[0].input_ids.tolist() for pass_ in (0, 0, 1, 2)]
    alone = build_rows(long, BlockGrid(4), objective, MASK, np.random.default_rng([3, long.trajectory.index]))
    assert rows[0] == rows[1] == alone[0].input_ids.tolist()
    assert len({tuple(row) for row in rows}) == 3
