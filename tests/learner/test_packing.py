"""Rows laid out in lines: nothing is lost or changed. `pytest tests/learner/test_packing.py`"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opdlm.actors.teacher.scoring import score
from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.masks import PADDING, training_mask
from opdlm.common.types import ScoredTrajectory
from opdlm.learner import row_attention
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import LINE_MULTIPLE, collate, micro_batches, pack
from opdlm.learner.row_attention import RowParts
from opdlm.learner.rows import Row, build_rows
from opdlm.learner.targets import gather_targets
from tests.tiny import FORMS_AND_GRIDS, MASK, VOCABULARY, tiny_model, trajectory

TEACHER = tiny_model(1)


def _rows(
    states: str, shapes: list[tuple[int, int]], kind: str = "absolute", form: StudentForm = PAPER_FORM
) -> list[Row]:
    """All rows of random trajectories. `shapes`: (prompt, response) length of each."""
    grid, rng = BlockGrid(4, kind), np.random.default_rng(len(shapes))
    trajectories = []
    for prompt, response in shapes:
        kept = grid.kept_length(prompt, response)
        ids = [list(rng.integers(3, 30, length)) for length in (prompt, kept)]
        trajectories.append(trajectory(*ids, list(rng.integers(1, 4, kept)), response))
    objective = ObjectiveConfig(selection=states, exclude_eos=False)
    scored = zip(trajectories, score(TEACHER, trajectories, "hidden", 0, 64), strict=True)
    rows = [r for t, s in scored for r in build_rows(ScoredTrajectory(t, s), grid, objective, MASK, rng, form)]
    return [row for row in rows if len(row.loss_positions)]


def _gradients(batch, form: StudentForm, dense: bool = False) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Loss, divergences and gradients. `dense`: with a mask over all pairs of tokens in place of `RowParts`."""
    student, objective = tiny_model(2).double(), ObjectiveConfig(exclude_eos=False)
    targets = gather_targets(batch.rows, TEACHER.lm_head.weight.detach(), objective)
    weights = 1.0 + torch.arange(len(batch.loss_row)) % 3
    module = DistillModule(student, objective, 7, form=form)
    if dense:
        student.set_attn_implementation("sdpa")
        module._mask = lambda batch: (training_mask(batch.samples, batch.copies, batch.blocks, form.causal), {})
    loss, losses = module(batch, targets, weights)
    loss.backward()
    return loss.detach(), losses, [p.grad for p in student.parameters()]


@pytest.mark.parametrize("states", ["one_state_per_block", "all_states"])
@pytest.mark.parametrize(("form", "kind"), FORMS_AND_GRIDS)
@pytest.mark.parametrize(
    ("multiple", "dense", "piece"),  # multiple: of the packed line's tokens; None: one row per line
    [
        *(
            (multiple, dense, piece)
            for multiple in (1, 64)
            for dense, piece in ((False, 1024), (False, 5), (True, 1024))
        ),
        (None, False, 1024),
    ],
)
def test_losses_and_gradients_are_those_of_one_row_per_line_and_a_dense_mask(
    monkeypatch, states, form, kind, multiple, dense, piece
) -> None:
    monkeypatch.setattr(row_attention, "PIECE", piece)
    rows = _rows(states, [(5, 9), (3, 17), (8, 4), (6, 12), (7, 9)], kind, form)
    apart = collate(rows)
    batch = apart if multiple is None else pack(rows, multiple)
    assert multiple is None or (batch.input_ids.shape[0], batch.input_ids.shape[1] % multiple) == (1, 0)
    expected, ours = _gradients(apart, form, dense=True), _gradients(batch, form, dense)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-4, atol=1e-5)
    for a, b in zip(ours[2], expected[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_states_of_a_trajectory_share_its_clean_half() -> None:
    rows = _rows("all_states", [(6, 12)])
    assert len(rows) > 2
    packed = pack(rows)
    clean = rows[0].clean_length
    assert packed.input_ids.shape == (1, clean + len(rows) * (len(rows[0].input_ids) - clean))
    assert int((packed.copies == 0).sum()) == clean
    assert not (packed.samples == PADDING).any()


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20)), min_size=1, max_size=9))
@settings(max_examples=30)
def test_every_token_has_one_place(shapes) -> None:
    """And every loss position is where its row's mask token is."""
    rows = _rows("one_state_per_block", shapes)
    assume(rows)
    packed = pack(rows)
    assert packed.input_ids.numel() == sum(len(row.input_ids) for row in rows)
    columns = list(zip(packed.loss_line.tolist(), packed.loss_column.tolist(), strict=True))
    assert len(set(columns)) == len(columns) == sum(len(row.loss_columns) for row in rows)
    assert all(packed.input_ids[place] == MASK and packed.samples[place] != PADDING for place in columns)
    positions = np.concatenate([row.position_ids[row.loss_columns] for row in rows])
    assert packed.position_ids[packed.loss_line, packed.loss_column].tolist() == positions.tolist()
    assert not (packed.samples == PADDING).any()
    parts = RowParts.from_batch(packed, torch.float32)
    assert parts.padding == parts.clean.numel() + parts.noisy.numel() - packed.input_ids.numel()


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=9),
    st.sampled_from(["one_state_per_block", "all_states"]),
    st.integers(1, 200),
)
@settings(max_examples=60)
def test_micro_batches_hold_each_row_once_and_are_bounded(shapes, states, most) -> None:
    """A micro-batch with more than one row has at most `most` tokens, and the next row found no room in it."""
    rows = _rows(states, shapes)
    batches = micro_batches(rows, most)
    assert sorted(id(row) for batch in batches for row in batch.rows) == sorted(map(id, rows))
    lengths = [len(row.input_ids) for batch in batches for row in batch.rows]
    assert lengths == sorted(lengths, reverse=True)
    assert all(batch.input_ids.shape[1] % LINE_MULTIPLE == 0 for batch in batches)

    def places(batch) -> int:
        parts = RowParts.from_batch(batch, torch.float32)
        return parts.clean.numel() + parts.noisy.numel()

    assert all(len(batch.rows) == 1 or places(batch) <= most for batch in batches)
    for batch, following in itertools.pairwise(batches):
        assert places(pack([*batch.rows, following.rows[0]])) > most


def test_rows_that_are_longer_than_a_micro_batch_are_alone() -> None:
    rows = _rows("one_state_per_block", [(4, 40), (4, 12), (4, 60), (4, 8), (4, 8)])
    batches = [[len(row.input_ids) for row in batch.rows] for batch in micro_batches(rows, 64)]
    assert batches == [[124], [84], [28, 20], [20]]


def test_pieces_of_long_rows_have_only_the_keys_that_they_see(monkeypatch) -> None:
    """A row of 400 response tokens in pieces of 40 queries: less than half of the numbers of two whole masks."""
    batch = pack(_rows("one_state_per_block", [(6, 400)], "response"))
    whole = RowParts.from_batch(batch, torch.float32)
    monkeypatch.setattr(row_attention, "PIECE", 40)
    parts = RowParts.from_batch(batch, torch.float32)
    assert [piece.clean.stop for piece in parts.clean_pieces[:2]] == [42, 82]  # to the end of the last query's block
    assert [piece.own for piece in parts.noisy_pieces] == [slice(40 * i, 40 * i + 40) for i in range(10)]
    assert [piece.clean.stop for piece in parts.noisy_pieces[:2]] == [6 + 36, 6 + 76]  # blocks before the last one

    def numbers(parts: RowParts) -> int:
        return sum(piece.mask.numel() for piece in [*parts.clean_pieces, *parts.noisy_pieces])

    assert numbers(parts) < 0.45 * numbers(whole)


@pytest.mark.parametrize("form", [PAPER_FORM, StudentForm(True, "causal")], ids=str)
@torch.no_grad()
def test_flex_attention_gives_the_losses_of_the_dense_mask(form) -> None:
    """Learners on GPUs run flex_attention. On a CPU it has no backward pass, and must be compiled first."""
    student, objective = tiny_model(2, hidden_size=32, head_dim=16), ObjectiveConfig(exclude_eos=False)
    rows = _rows("all_states", [(5, 9), (3, 17), (8, 4), (40, 70)], "response", form)
    batch = pack(rows)
    assert batch.input_ids.shape[1] > 2 * 128, "more than one tile, and not a whole number of them"
    targets = gather_targets(rows, torch.randn(VOCABULARY, TEACHER.config.hidden_size), objective)
    weights = torch.ones(len(batch.loss_row))
    _, dense = DistillModule(student, objective, 64, form=form)(batch, targets, weights)
    student.set_attn_implementation("flex_attention")
    _, flex = DistillModule(student, objective, 64, "flex_attention", form)(batch, targets, weights)
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-5)
