"""Selections of states, and the rows made of them. `pytest tests/learner/test_states.py`"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlm.common.config.schema import LearnerConfig, ObjectiveConfig
from opdlm.common.grid import BlockGrid
from opdlm.learner.rows import build_rows
from opdlm.learner.states import SELECTIONS, BlockStates
from opdlm.learner.train_step import TrainStep
from tests.golden_files import unscored
from tests.tiny import EOS, MASK, trajectory

steps_of_blocks = st.lists(st.lists(st.integers(1, 5), min_size=4, max_size=4), min_size=1, max_size=4)


@given(steps_of_blocks, st.sampled_from(sorted(SELECTIONS)), st.integers(0, 10**6))
def test_selected_states_were_visited(blocks, selection, seed) -> None:
    """Every block of every row is in one of its visited states; where its states have run out, nothing is masked."""
    reveal = np.concatenate([np.array(b) + 10 * i for i, b in enumerate(blocks)])
    rows = SELECTIONS[selection](BlockStates(reveal, 8, BlockGrid(4)), np.random.default_rng(seed))
    for row in rows:
        assert (row.masked | ~row.in_loss).all(), "a loss is taken at masked positions alone"
        for i in range(len(blocks)):
            block, inside = reveal[4 * i : 4 * i + 4], row.masked[4 * i : 4 * i + 4]
            visited = [tuple(block >= s) for s in sorted(set(block))]
            if selection == "random_mask":
                assert inside.any()
            elif selection in ("one_state_per_block", "one_sampled_state"):
                assert tuple(inside) in visited
            else:
                assert tuple(inside) in visited or not inside.any()
    if selection in ("all_states", "revealed"):
        assert len(rows) == max(len(set(b)) for b in blocks)
        for i, b in enumerate(blocks):
            masked = [tuple(row.masked[4 * i : 4 * i + 4]) for row in rows]
            states = [state for state in masked if any(state)]
            assert len(states) == len(set(states)) == len(set(b))


@given(steps_of_blocks)
def test_the_policy_gradient_takes_each_token_once(blocks) -> None:
    """In `revealed` exactly, in the state that revealed it; in `one_sampled_state` in expectation."""
    reveal = np.concatenate([np.array(b) + 10 * i for i, b in enumerate(blocks)])
    states = BlockStates(reveal, 8, BlockGrid(4))
    rows = SELECTIONS["revealed"](states, np.random.default_rng(0))
    assert (sum(row.in_loss.astype(int) for row in rows) == 1).all()
    for row in rows:
        for place in np.flatnonzero(row.in_loss):
            block = slice(place // 4 * 4, place // 4 * 4 + 4)
            assert (row.masked[block] == (reveal[block] >= reveal[place])).all()

    class EachInTurn:
        """Draws every state of every block equally often in twelve draws."""

        def __init__(self, turn: int) -> None:
            self.turn = turn

        def integers(self, low: int, high: np.ndarray) -> np.ndarray:
            return low + self.turn % (high - low)

    draws = [SELECTIONS["one_sampled_state"](states, EachInTurn(turn)) for turn in range(12)]
    assert {len(drawn) for drawn in draws} == {1}
    assert np.allclose(np.mean([drawn[0].in_loss * drawn[0].weight for drawn in draws], axis=0), 1)


def test_states_are_drawn_uniformly() -> None:
    states = BlockStates(np.array([1, 2, 3, 4]), 4, BlockGrid(4))
    rng = np.random.default_rng(0)
    counts = np.bincount([SELECTIONS["one_state_per_block"](states, rng)[0].masked.sum() for _ in range(4000)])
    assert counts[0] == 0
    assert abs(counts[1:] - 1000).max() < 150


def test_random_mask_ratio_is_uniform_per_block() -> None:
    states = BlockStates(np.arange(1, 65), 64, BlockGrid(64))
    rng = np.random.default_rng(0)
    masked = np.array([SELECTIONS["random_mask"](states, rng)[0].masked.sum() for _ in range(3000)])
    assert masked.min() >= 1
    assert np.allclose(np.quantile(masked, [0.25, 0.5, 0.75]), [16, 32, 48], atol=2.5)


@pytest.mark.parametrize(("exclude", "expected"), [(True, [0, 1]), (False, [0, 1, 2])])
def test_no_loss_past_the_end(exclude, expected) -> None:
    """Position 2 is the end token; 3 and 4 were decoded after it, so they are in the state but never in the loss."""
    one = trajectory([5, 6, 7], [9, 8, EOS, 4, 4], [1, 2, 2, 2, 2], length=3)
    objective = ObjectiveConfig(selection="all_states", exclude_eos=exclude)
    rows = build_rows(unscored(one), BlockGrid(4), objective, MASK, np.random.default_rng(0))
    assert rows[0].loss_positions.tolist() == expected
    noisy = rows[0].input_ids[8:]
    assert noisy.tolist() == [5, 6, 7, MASK, MASK, MASK, MASK, MASK]
    assert rows[0].position_ids.tolist() == [*range(8), *range(8)]
    assert (rows[0].input_ids[rows[0].loss_columns] == MASK).all()


def test_a_second_pass_draws_other_states_of_the_same_trajectory() -> None:
    """The first pass draws the states that a run of one pass draws."""
    objective = ObjectiveConfig(selection="one_state_per_block", exclude_eos=False)
    step = TrainStep(None, LearnerConfig(), objective, BlockGrid(4), MASK, None, seed=3)
    long = unscored(trajectory([5, 6, 7, 8], [9] * 40, [1 + i % 4 for i in range(40)]))
    rows = [step._rows(long, pass_number)[0].input_ids.tolist() for pass_number in (0, 0, 1, 2)]
    alone = build_rows(long, BlockGrid(4), objective, MASK, np.random.default_rng([3, long.trajectory.index]))
    assert rows[0] == rows[1] == alone[0].input_ids.tolist()
    assert len({tuple(row) for row in rows}) == 3


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_places_behind_a_wrong_draft_weigh_what_the_run_file_says(weight) -> None:
    """Drafts of four masks at response positions 0, 1 and 4. The first one's first token was wrong, so its places 2 and
    3 were not reached; the second one's three were all right; the third one ends with the response."""
    sample = unscored(trajectory([5, 6], [11, 12, 13, 14, 15, 16], [1, 2, 3, 3, 3, 4]))
    objective = ObjectiveConfig(selection="drafts", unreached_weight=weight, exclude_eos=False)
    (row,) = build_rows(sample, BlockGrid(4, "response"), objective, MASK, np.random.default_rng(0))
    found = list(zip(row.loss_positions.tolist(), row.loss_weights.tolist(), strict=True))
    every = [(1, 1.0), (2, weight), (3, weight), (2, 1.0), (3, 1.0), (4, 1.0), (5, 1.0)]
    assert found == [place for place in every if place[1] > 0]
    assert len(row.loss_columns) == len(row.loss_positions)
