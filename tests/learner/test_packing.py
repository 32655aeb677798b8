"""Rows in lines: what is packed is what was there. `pytest tests/learner/test_packing.py`"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from actors.teacher_scoring import score
from common.config.schema import ObjectiveConfig
from common.grid import BlockGrid
from common.masks import PADDING
from common.types import ScoredTrajectory
from learner.distill import DistillModule
from learner.packing import LONGEST_LINE, PADDING_SHARE, collate, pack, plan_lines
from learner.rows import Row, build_rows
from learner.targets import gather_targets
from tests.tiny import MASK, VOCABULARY, tiny_model, trajectory

TEACHER = tiny_model(1)


def _rows(states: str, shapes: list[tuple[int, int]], kind: str = "absolute") -> list[Row]:
    """All rows of random trajectories of (prompt, response) lengths."""
    grid, rng = BlockGrid(4, kind), np.random.default_rng(len(shapes))
    trajectories = []
    for prompt, response in shapes:
        kept = grid.kept_length(prompt, response)
        ids = [list(rng.integers(3, 30, length)) for length in (prompt, kept)]
        trajectories.append(trajectory(*ids, list(rng.integers(1, 4, kept)), response))
    objective = ObjectiveConfig(selection=states, exclude_eos=False)
    scored = zip(trajectories, score(TEACHER, trajectories, "hidden", 0, 64), strict=True)
    rows = [r for t, s in scored for r in build_rows(ScoredTrajectory(t, s), grid, objective, MASK, rng)]
    return [row for row in rows if len(row.loss_positions)]


def _gradients(batch) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    student, objective = tiny_model(2), ObjectiveConfig(exclude_eos=False)
    targets = gather_targets(batch.rows, TEACHER.lm_head.weight.detach(), objective)
    weights = 1.0 + torch.arange(len(batch.loss_row)) % 3
    loss, losses = DistillModule(student, objective, 7)(batch, targets, weights)
    loss.backward()
    return loss.detach(), losses, [p.grad for p in student.parameters()]


@pytest.mark.parametrize("states", ["one_state_per_block", "all_states"])
@pytest.mark.parametrize("kind", ["absolute", "response"])
@pytest.mark.parametrize("one_line", [False, True])
def test_losses_and_gradients_are_those_of_a_row_a_line(states, kind, one_line) -> None:
    rows = _rows(states, [(5, 9), (3, 17), (8, 4), (6, 12), (7, 9)], kind)
    apart, packed = collate(rows), pack(rows, one_line)
    if states == "all_states" or one_line:
        assert packed.input_ids.shape[0] < len(rows)
    expected, ours = _gradients(apart), _gradients(packed)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-4, atol=1e-5)
    for a, b in zip(ours[2], expected[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_states_of_a_trajectory_share_its_clean_half() -> None:
    rows = _rows("all_states", [(6, 12)])
    assert len(rows) > 2
    packed = pack(rows, one_line=False)
    clean = rows[0].clean_length
    assert packed.input_ids.shape == (1, clean + len(rows) * (len(rows[0].input_ids) - clean))
    assert int((packed.copies == 0).sum()) == clean
    assert packed.padding_tokens == 0


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20)), min_size=1, max_size=9), st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_token_has_one_place(shapes, one_line) -> None:
    """And every loss position is found where its row's mask token is."""
    rows = _rows("one_state_per_block", shapes)
    assume(rows)
    packed = pack(rows, one_line)
    assert packed.input_ids.numel() - packed.padding_tokens == sum(len(row.input_ids) for row in rows)
    columns = list(zip(packed.loss_line.tolist(), packed.loss_column.tolist(), strict=True))
    assert len(set(columns)) == len(columns) == sum(len(row.loss_columns) for row in rows)
    assert all(packed.input_ids[place] == MASK and packed.samples[place] != PADDING for place in columns)
    positions = np.concatenate([row.position_ids[row.loss_columns] for row in rows])
    assert packed.position_ids[packed.loss_line, packed.loss_column].tolist() == positions.tolist()
    assert not one_line or packed.padding_tokens == 0


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
@settings(deadline=None)
def test_lines_hold_everything_once_and_never_more_tokens_than_a_row_a_line(lengths) -> None:
    lines = plan_lines(lengths)
    assert sorted(place for line in lines for place in line) == list(range(len(lengths)))
    longest = max(sum(lengths[place] for place in line) for line in lines)
    assert longest <= max(LONGEST_LINE, *lengths)
    assert longest * len(lines) <= max(lengths) * len(lengths)


def test_padding_of_the_demos_lengths_stays_under_its_share() -> None:
    """Sixteen rows as long as a chain problem's, many times."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        lengths = (rng.integers(6, 10, 16) + 2 * rng.integers(8, 28, 16)).tolist()
        lines = plan_lines(lengths)
        tokens = len(lines) * max(sum(lengths[place] for place in line) for line in lines)
        shares.append(1 - sum(lengths) / tokens)
    assert np.mean(shares) < PADDING_SHARE


@torch.no_grad()
def test_flex_attention_gives_the_losses_of_the_dense_mask() -> None:
    """Which is what learners on GPUs run. On a CPU it has no backward; it compiles, which takes its time."""
    student, objective = tiny_model(2, hidden_size=32, head_dim=16), ObjectiveConfig(exclude_eos=False)
    rows = _rows("all_states", [(5, 9), (3, 17), (8, 4), (40, 70)])
    batch = pack(rows, one_line=True)
    assert batch.input_ids.shape[1] > 2 * 128, "more than one tile, and not a whole number of them"
    targets = gather_targets(rows, torch.randn(VOCABULARY, TEACHER.config.hidden_size), objective)
    weights = torch.ones(len(batch.loss_row))
    _, dense = DistillModule(student, objective, 64)(batch, targets, weights)
    student.set_attn_implementation("flex_attention")
    _, flex = DistillModule(student, objective, 64, "flex_attention")(batch, targets, weights)
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-5)
