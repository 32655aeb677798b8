"""Short and slow versions of the fast code that are easy to verify; tests compare the fast code with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from opdlm.actors.rollout.remasking import STRATEGIES, DenoisingStep
from opdlm.actors.rollout.sampling import draw_candidates, hashed_uniform
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.model.adapters import mark_noisy
from opdlm.common.types import RolloutRequest


@torch.no_grad()
def uncached_decode(
    model,
    settings: DecodeSettings,
    mask_id: int,
    eos_ids: set[int],
    request: RolloutRequest,
    model_changes: Sequence[tuple[int, Any]] = (),
    form: StudentForm = PAPER_FORM,
) -> tuple[list[int], list[int]]:
    """Decodes one sequence without a cache and without a batch.

    Args:
        model_changes: (number of denoising steps, model) pairs in rising order; each model decodes after that number of
            steps, as new weights do with `rollout.on_new_weights: continue`.

    Returns: kept response tokens, and the reveal step of each.
    """
    grid, size = BlockGrid(settings.block_size, settings.block_grid), settings.block_size
    prompt = request.prompt_ids.tolist()
    tokens, steps, step = list(prompt), [0] * len(prompt), 0
    start = grid.first_block_start(len(prompt))
    while True:
        tokens += [mask_id] * (start + size - len(tokens))
        steps += [0] * (start + size - len(steps))
        block_step = 0
        while any(s == 0 for s in steps[max(start, len(prompt)) :]):
            for steps_before, successor in model_changes:
                model = successor if step >= steps_before else model
            logits = full_forward(model, tokens, grid, len(prompt), form)[start:]
            logits[:, mask_id] = float("-inf")
            positions = torch.arange(start, start + size)
            masked = torch.tensor([p >= len(prompt) and steps[p] == 0 for p in positions])
            seed = torch.tensor(request.seed)
            uniform = hashed_uniform(seed, positions, step, 0)
            candidates = draw_candidates(logits, uniform, settings.temperature, settings.top_k, settings.top_p)
            steps_left = max(settings.steps_per_block - block_step, 1)
            view = DenoisingStep(
                masked=masked[None],
                confidence=logits.softmax(-1).gather(1, candidates[:, None]).T,
                static_count=torch.tensor([-(-int(masked.sum()) // steps_left)]),
                threshold=torch.tensor([settings.threshold]),
                entropy_budget=settings.entropy_budget,
                entropy=lambda logits=logits: torch.distributions.Categorical(logits=logits).entropy()[None],
                noise=lambda seed=seed, positions=positions, step=step: hashed_uniform(seed, positions, step, 1)[None],
            )
            step, block_step = step + 1, block_step + 1
            for column in STRATEGIES[settings.strategy](view)[0].nonzero()[:, 0].tolist():
                tokens[start + column], steps[start + column] = int(candidates[column]), step
        start += size
        response = tokens[len(prompt) :]
        if any(t in eos_ids for t in response) or len(response) >= request.max_new_tokens:
            return response, steps[len(prompt) :]


@torch.no_grad()
def full_forward(
    model, tokens: list[int], grid: BlockGrid, prompt_length: int, form: StudentForm = PAPER_FORM
) -> torch.Tensor:
    """Logits `[T, V]` of one whole sequence, with the mask computed for each pair of tokens. The last block is noisy.

    Row i of the result predicts token i; with a logit shift, row 0 predicts nothing.
    """
    blocks = [(i + grid.offset(prompt_length)) // grid.block_size for i in range(len(tokens))]

    def sees(q: int, k: int) -> bool:
        return k <= q if form.causal and blocks[q] < blocks[-1] else blocks[k] <= blocks[q]

    places = range(len(tokens))
    mask = torch.tensor([[sees(q, k) for k in places] for q in places])[None, None]
    logits = model(input_ids=torch.tensor([tokens]), attention_mask=mask, use_cache=False).logits[0].float()
    return torch.cat([logits[:1], logits[:-1]]) if form.logit_shift else logits


@torch.no_grad()
def draft_logits(model: Any, clean: list[int], masks: int, mask_id: int) -> torch.Tensor:
    """Of a lossless student, `[T, V]`: clean tokens, causal, and behind them masks that see them and each other.

    No cache and no batch; the mask token's logit is the model's own.
    """
    length = len(clean) + masks
    seen = torch.ones(length, length).tril().bool()
    seen[len(clean) :] = True
    mark_noisy(model, (torch.arange(length) >= len(clean))[None])
    ids = torch.tensor([clean + [mask_id] * masks])
    return model(input_ids=ids, attention_mask=seen[None, None], use_cache=False).logits[0].float()
