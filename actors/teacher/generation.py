"""Plain autoregressive generation with transformers, for the teacher and for checkpoints that are not converted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from opdlm.actors.progress import OnBatch, unheard
from opdlm.common.errors import OpdlmError
from opdlm.common.model.load import input_device
from opdlm.common.seeds import wrapped
from opdlm.common.tensors import is_finite
from opdlm.common.token_ids import TokenIds


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    tokens: TokenIds | None = None,
    on_batch: OnBatch = unheard,
) -> list[np.ndarray]:
    """Generates a response `[R] int32` to each prompt `[P] int32`, in the order of the prompts.

    A response ends with the first end-of-sequence token, which it includes, or at `max_new_tokens`.

    Args:
        temperature: 0 decodes greedily; else the tokens are sampled from the whole vocabulary at this temperature.
        seed: seed of the sampling. A sampled response also depends on the prompts in the same batch.
        tokens: the rows of the vocabulary that are tokens; no other row is drawn. None: all rows.
        on_batch: called after each batch.

    Raises:
        OpdlmError: the model's logits are not finite.
    """
    generation = GenerationConfig(eos_token_id=list(eos_ids), pad_token_id=eos_ids[0], do_sample=False)
    if temperature > 0:
        torch.manual_seed(wrapped(seed))  # transformers draws from the global generator
        generation.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    # transformers would merge in the settings of the model's folder (a repetition penalty, say) and change the
    # distribution, so the model gets ours for the time of the call.
    own, model.generation_config = model.generation_config, generation
    try:
        return _generate(model, prompts, max_new_tokens, eos_ids, batch_size, TokensOnly(model, tokens), on_batch)
    finally:
        model.generation_config = own


class TokensOnly(LogitsProcessor):
    """Keeps rows that no token has from being drawn, and refuses logits that are not finite."""

    def __init__(self, model: Any, tokens: TokenIds | None) -> None:
        rows = model.lm_head.out_features
        others = tokens.others(rows) if tokens is not None else []
        self._others = torch.tensor(others, dtype=torch.int64, device=model.lm_head.weight.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores`: the logits `[B, V]` of the next token."""
        if not is_finite(scores):
            raise OpdlmError(
                f"the model's logits hold NaN or infinity at position {input_ids.shape[1] - 1}; its weights or its "
                "number format are broken"
            )
        return scores.index_fill(1, self._others.to(scores.device), float("-inf")) if len(self._others) else scores


def _generate(
    model: Any,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    batch_size: int,
    tokens_only: TokensOnly,
    on_batch: OnBatch,
) -> list[np.ndarray]:
    device = input_device(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, attended = left_padded([prompts[i] for i in batch])
        output = model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(attended).to(device),
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([tokens_only]),
        )
        for row, i in enumerate(batch):
            new = output[row, ids.shape[1] :].cpu().numpy().astype(np.int32)
            stops = np.flatnonzero(np.isin(new, eos_ids))
            responses[i] = new[: stops[0] + 1] if stops.size else new
        on_batch(batch)
    return responses


def left_padded(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask `[B, P]` int64 of prompts, padded on the left: generation goes on at the right."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), longest), dtype=np.int64)
    attended = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        attended[row, longest - len(prompt) :] = 1
    return ids, attended
