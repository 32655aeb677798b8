"""Train-decode parity (METHOD.md section 2), the property on which the method rests.

For every state of every rollout, the training forward gives the same logits at the masked positions as the decoder
saw, for any prompt length, any response end, either grid and every form of the student. `pytest tests/test_parity.py`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.observation import StepObservation
from opdlm.actors.rollout.remasking import STRATEGIES
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.form import StudentForm
from opdlm.common.masks import training_mask
from opdlm.common.model.load import hidden_states
from opdlm.common.types import RolloutRequest
from opdlm.learner.packing import MicroBatch, collate
from opdlm.learner.rows import build_rows
from tests.golden_files import unscored
from tests.tiny import EOS, FORMS_AND_GRIDS, MASK, OTHER_FAMILIES, request, tiny_model

MODELS = [*(tiny_model(seed) for seed in range(10, 13)), *(tiny_model(13, **o) for o in OTHER_FAMILIES.values())]


@given(
    model=st.sampled_from(MODELS),
    block_size=st.integers(1, 6),
    form_and_grid=st.sampled_from(FORMS_AND_GRIDS),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    temperature=st.sampled_from([0.0, 1.0]),
    lengths=st.lists(st.tuples(st.integers(1, 13), st.integers(1, 15)), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=50)
def test_training_forward_sees_what_the_decoder_saw(
    model, block_size, form_and_grid, strategy, temperature, lengths, seed
) -> None:
    form, grid = form_and_grid
    how = DecodeSettings(block_size, grid, strategy, 0.4, 1.0, temperature=temperature)
    requests = [request(p, i, limit, seed) for i, (p, limit) in enumerate(lengths)]
    trained, decoded = both_logits(model, how, form, requests, dense_logits)
    torch.testing.assert_close(trained, decoded, rtol=1e-4, atol=1e-4)


Forward = Callable[[Any, MicroBatch, StudentForm], torch.Tensor]


def dense_logits(model: Any, batch: MicroBatch, form: StudentForm) -> torch.Tensor:
    """The logits `[B, T, V]` of training rows, by a dense mask."""
    mask = training_mask(batch.samples, batch.copies, batch.blocks, form.causal)
    return model.lm_head(hidden_states(model, batch.input_ids, batch.position_ids, mask))


def both_logits(
    model: Any, how: DecodeSettings, form: StudentForm, requests: Sequence[RolloutRequest], forward: Forward
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes, and runs the training forward over every state of every rollout.

    Returns: the logits `[N, V]` of training and of decoding, at every masked position that the decoder saw.
    """
    seen: dict[tuple[int, int, int], torch.Tensor] = {}  # logits [V] by (sequence, step, position)

    def observe(view: StepObservation) -> None:
        for row, index in enumerate(view.index):
            for column in view.masked[row].nonzero()[:, 0].tolist():
                place = (index, view.step[row], int(view.positions[row, column]))
                seen[place] = view.logits[row, column].clone()

    decoder = BlockDecoder(model, how, MASK, [EOS], batch_size=3, form=form)
    trajectories, _ = decoder.decode(requests, observer=observe)

    objective = ObjectiveConfig(selection="all_states", exclude_eos=False)
    trained, decoded = [], []
    for t in trajectories:
        rows = build_rows(unscored(t), decoder.grid, objective, MASK, np.random.default_rng(0), form)
        batch = collate(rows)
        with torch.no_grad():
            logits = forward(model, batch.to(model.device), form).float().cpu()
        logits[..., MASK] = float("-inf")
        start, length = len(batch.rows[0].input_ids) - len(t.response_ids), len(t.prompt_ids)
        size, offset = how.block_size, decoder.grid.offset(length)
        steps_of_block = _distinct_steps(t.reveal_step, length, decoder.grid)
        for k, row in enumerate(rows):
            for i in np.flatnonzero(row.input_ids[start:] == MASK).tolist():
                if k >= len(steps_of_block[i]):
                    continue  # the block has fewer states; a decoded token is never the mask token
                column = start + i
                if form.logit_shift:  # a block's first token is predicted at the clean token before the block
                    column = length + i - 1 if (length + i + offset) % size == 0 else start + i - 1
                trained.append(logits[k, column])
                decoded.append(seen[(t.index, int(steps_of_block[i][k]), length + i)])
    assert len(trained) == len(seen), "some positions that the decoder saw were not compared"
    return torch.stack(trained), torch.stack(decoded)


def _distinct_steps(reveal: np.ndarray, prompt_length: int, grid) -> list[np.ndarray]:
    """For each response token, the distinct reveal steps of its block, in rising order."""
    blocks = [(prompt_length + i + grid.offset(prompt_length)) // grid.block_size for i in range(len(reveal))]
    return [np.unique(reveal[np.array(blocks) == block]) for block in blocks]
