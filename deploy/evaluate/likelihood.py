"""Log-likelihoods of given texts under a student: exact where its clean path is a teacher, else a lower bound.

A block-diffusion student draws the tokens of a block in some order. Let the order be uniform, one token a step, and
p(x) the probability that a block of L tokens comes out as x. Then, over orders,

    log p(x) = log E prod_i p(x_i | those before it)  >=  E sum_i log p(x_i | those before it),

and the right side is E_k E_masks (L / k) sum_(masked i) log p(x_i | the block with k masks), with k uniform in 1 .. L.
A sample draws k and the masks of every block, so one forward of a training row gives it. Tokens of the last block
behind the text stay masked: these orders reveal them last. A block of one token has one order, and is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opdlm.common.form import StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.masks import training_mask
from opdlm.common.model.load import hidden_states
from opdlm.common.types import LogitsTargets, ScoredTrajectory, Trajectory
from opdlm.learner.packing import pack
from opdlm.learner.rows import Row, build_row
from opdlm.learner.states import ChosenStates

_SAMPLES_A_FORWARD = 32


@dataclass(frozen=True, slots=True)
class Bound:
    """An estimate of a lower bound of a log-likelihood, in nats."""

    mean: float
    stderr: float
    """Standard error of the mean; 0 where each sample is exact."""
    samples: int


@torch.inference_mode()
def likelihood_bound(
    student: Any,
    context: np.ndarray,
    text: np.ndarray,
    grid: BlockGrid,
    form: StudentForm,
    never: Sequence[int],
    mask_id: int,
    samples: int,
    rng: np.random.Generator,
) -> Bound:
    """Estimates a lower bound of log p(text | context) at temperature 1.

    Args:
        student: causal LM of transformers.
        context, text: `[P]` and `[R]` int32, both at least one token.
        never: rows of the vocabulary that are never drawn.
    """
    rows = [_row(context, text, grid, form, mask_id, rng) for _ in range(samples)]
    totals = np.zeros(samples)
    for first in range(0, samples, _SAMPLES_A_FORWARD):
        part = rows[first : first + _SAMPLES_A_FORWARD]
        batch = pack(part).to(student.device)
        mask = training_mask(batch.samples, batch.copies, batch.blocks, form.causal)
        hidden = hidden_states(student, batch.input_ids, batch.position_ids, mask, noisy=batch.copies > 0)
        logprobs = _logprobs(student, hidden[batch.loss_line, batch.loss_column], never)
        found = np.concatenate([text[row.loss_positions] for row in part]).astype(np.int64)
        chosen = logprobs.gather(1, torch.from_numpy(found).to(student.device)[:, None])[:, 0].cpu().double().numpy()
        weights = np.concatenate([row.loss_weights for row in part])
        np.add.at(totals, first + batch.loss_row.cpu().numpy(), chosen * weights)
    stderr = float(totals.std(ddof=1) / np.sqrt(samples)) if samples > 1 else float("nan")
    return Bound(float(totals.mean()), stderr, samples)


def _row(
    context: np.ndarray, text: np.ndarray, grid: BlockGrid, form: StudentForm, mask_id: int, rng: np.random.Generator
) -> Row:
    """The training row of one sample; the weight of a token is L / k of its block."""
    kept = grid.kept_length(len(context), len(text))
    response = np.full(kept, mask_id, dtype=np.int32)
    response[: len(text)] = text
    masked, weight = np.arange(kept) >= len(text), np.zeros(kept, dtype=np.float32)
    blocks = (len(context) + np.arange(len(text)) + grid.offset(len(context))) // grid.block_size
    for block in np.unique(blocks):
        members = np.flatnonzero(blocks == block)
        count = int(rng.integers(1, len(members) + 1))
        drawn = rng.permutation(members)[:count]
        masked[drawn], weight[drawn] = True, len(members) / count
    trajectory = Trajectory(
        index=0,
        prompt_id="",
        prompt_ids=context,
        response_ids=response,
        reveal_step=np.ones(kept, dtype=np.int32),
        response_length=len(text),
        weight_version=0,
        finish_reason="length",
        denoising_steps=1,
    )
    scored = ScoredTrajectory(trajectory, LogitsTargets(np.zeros((0, 0), dtype=np.float32)))
    return build_row(scored, ChosenStates(masked, masked, weight), grid, mask_id, exclude_eos=False, form=form)


@torch.inference_mode()
def clean_likelihoods(
    model: Any, pairs: Sequence[tuple[np.ndarray, np.ndarray]], never: Sequence[int], batch_size: int
) -> list[tuple[float, bool]]:
    """log p(text | context) of the clean path, which is the teacher's in a lossless student, token by token.

    Args:
        pairs: context `[P]` and text `[R]` int32, both at least one token.
        never: rows of the vocabulary that are no outcome.

    Returns: of each pair, nats, and whether the text is what greedy decoding writes.
    """
    found = [(0.0, False)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        rows = [np.concatenate(pairs[i]).astype(np.int64) for i in part]
        ids = np.zeros((len(part), max(map(len, rows))), dtype=np.int64)  # padded behind, where no token sees it
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        hidden = hidden_states(model, torch.from_numpy(ids).to(model.device))
        for place, i in enumerate(part):
            begin, end = len(pairs[i][0]) - 1, len(rows[place]) - 1
            logprobs = _logprobs(model, hidden[place, begin:end], never)
            text = torch.from_numpy(pairs[i][1].astype(np.int64)).to(model.device)
            total = logprobs.gather(1, text[:, None]).double().sum()
            found[i] = float(total), bool((logprobs.argmax(1) == text).all())
    return found


def _logprobs(model: Any, hidden: torch.Tensor, never: Sequence[int]) -> torch.Tensor:
    """Log-probabilities `[n, V]` float32 at hidden states `[n, D]`."""
    logits = model.lm_head(hidden).float()
    logits[:, torch.tensor(list(never), dtype=torch.int64, device=logits.device)] = float("-inf")
    return logits.log_softmax(-1)
