"""Plain autoregressive generation with transformers: how a teacher (or an unconverted checkpoint) answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from opdlm.common.model.load import input_device


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[np.ndarray]:
    """Responses `[R] int32`, up to and with the first end-of-sequence token, in the order of the prompts.

    Args:
        temperature: 0 is greedy; else samples from the whole vocabulary at that temperature.
        seed: of sampling; what a prompt is answered depends on the prompts that it is batched with, too.
    """
    how = GenerationConfig(eos_token_id=list(eos_ids), pad_token_id=eos_ids[0], do_sample=False)
    if temperature > 0:
        torch.manual_seed(seed)  # transformers draws from the global generator
        how.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    # The folder's own settings (a repetition penalty, say) would be merged in; asked is the model's distribution.
    own, model.generation_config = model.generation_config, how
    try:
        return _generate(model, prompts, max_new_tokens, eos_ids, batch_size)
    finally:
        model.generation_config = own


def _generate(
    model: Any, prompts: Sequence[np.ndarray], max_new_tokens: int, eos_ids: Sequence[int], batch_size: int
) -> list[np.ndarray]:
    device = input_device(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in batch)
        ids = np.zeros((len(batch), longest), dtype=np.int64)
        attended = np.zeros_like(ids)
        for row, i in enumerate(batch):  # left padding: generation continues at the right
            ids[row, longest - len(prompts[i]) :] = prompts[i]
            attended[row, longest - len(prompts[i]) :] = 1
        output = model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(attended).to(device),
            max_new_tokens=max_new_tokens,
        )
        for row, i in enumerate(batch):
            new = output[row, longest:].cpu().numpy().astype(np.int32)
            stops = np.flatnonzero(np.isin(new, eos_ids))
            responses[i] = new[: stops[0] + 1] if stops.size else new
    return responses
