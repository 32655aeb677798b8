"""The block grid and the attention masks. `pytest tests/common/test_grid_and_masks.py`"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.grid import BlockGrid, block_index
from opdlm.common.masks import training_mask, training_mask_mod
from opdlm.common.model.load import hidden_states
from opdlm.learner.packing import collate
from opdlm.learner.rows import Row, build_rows
from tests.golden_files import unscored
from tests.tiny import MASK, tiny_model, trajectory


@given(st.integers(1, 9), st.sampled_from(["absolute", "response"]), st.integers(1, 40), st.integers(1, 40))
def test_grid_arithmetic_follows_from_the_definition(size, kind, prompt, response) -> None:
    """`first_block_start` and `kept_length` agree with `floor((i + offset) / S)` at every position."""
    grid = BlockGrid(size, kind)
    offset = grid.offset(prompt)
    block = [(i + offset) // size for i in range(prompt + response + size)]
    assert grid.first_block_start(prompt) == block.index(block[prompt])
    last = block[prompt + response - 1]
    assert prompt + grid.kept_length(prompt, response) == max(i for i, b in enumerate(block) if b == last) + 1
    assert block_index(torch.arange(len(block)), offset, size).tolist() == block
    if kind == "response":
        assert grid.prompt_tail(prompt) == 0
        assert (prompt + offset) % size == 0


def _rows(grid: BlockGrid, prompt: int, response: int, count: int = 1) -> list[Row]:
    kept = grid.kept_length(prompt, response)
    rng = np.random.default_rng([prompt, response])
    steps = rng.integers(1, 4, kept)
    one = trajectory(list(rng.integers(3, 30, prompt)), list(rng.integers(3, 30, kept)), list(steps), response)
    return [
        row
        for i in range(count)
        for row in build_rows(unscored(one), grid, ObjectiveConfig(), MASK, np.random.default_rng(i))
    ]


@given(st.integers(1, 6), st.sampled_from(["absolute", "response"]), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=40)
def test_training_masks_equal_the_rule_for_each_pair_of_tokens(size, kind, prompt, response) -> None:
    """The dense mask and the flex_attention mask both follow METHOD.md section 4, padding included."""
    grid = BlockGrid(size, kind)
    batch = collate(_rows(grid, prompt, response) + _rows(grid, prompt + 2, response + 1))
    ours = training_mask(batch.samples, batch.copies, batch.blocks)[:, 0]
    length = batch.blocks.shape[1]
    flex = create_mask(
        training_mask_mod(batch.samples, batch.copies, batch.blocks), 2, None, length, length, device="cpu"
    )[:, 0]
    assert torch.equal(ours, flex)
    for row in range(2):
        real = len(batch.rows[row].input_ids)
        blocks, noisy = batch.blocks[row].tolist(), (batch.copies[row] > 0).tolist()
        for q in range(length):
            for k in range(length):
                if q >= real or k >= real:
                    expected = q == k
                elif noisy[q]:
                    expected = blocks[k] == blocks[q] if noisy[k] else blocks[k] < blocks[q]
                else:
                    expected = not noisy[k] and blocks[k] <= blocks[q]
                assert bool(ours[row, q, k]) == expected, (row, q, k)


@pytest.mark.parametrize("kind", ["absolute", "response"])
@pytest.mark.parametrize("prompt", [4, 5, 7])
def test_noisy_logits_depend_on_no_later_and_no_other_noisy_block(kind, prompt) -> None:
    """Clean tokens of the same or a later block, and noisy tokens of another block, do not change a block's logits."""
    model, grid = tiny_model(5), BlockGrid(4, kind)
    (row,) = _rows(grid, prompt, 11)
    batch = collate([row])
    clean = int((batch.copies[0] == 0).sum())
    mask = training_mask(batch.samples, batch.copies, batch.blocks)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.lm_head(hidden_states(model, ids, batch.position_ids, mask))[0]

    before = logits(batch.input_ids)
    for column in range(clean, batch.input_ids.shape[1]):
        block = int(batch.blocks[0, column])
        for other in range(batch.input_ids.shape[1]):
            changed = batch.input_ids.clone()
            changed[0, other] = (changed[0, other] + 7) % 30
            same = torch.equal(logits(changed)[column], before[column])
            other_block, other_noisy = int(batch.blocks[0, other]), bool(batch.copies[0, other])
            visible = other_block == block if other_noisy else other_block < block
            assert same == (not visible), (column, other)
