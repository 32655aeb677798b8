"""Plain autoregressive generation with transformers, for the teacher and for checkpoints that are not converted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from opdlm.actors.progress import OnBatch, unheard
from opdlm.actors.rollout.stopping import StopStrings
from opdlm.common.errors import OpdlmError
from opdlm.common.model.load import input_device
from opdlm.common.seeds import wrapped
from opdlm.common.tensors import is_finite
from opdlm.common.token_ids import TokenIds

IsOver = Callable[[int, np.ndarray], bool]
"""Whether the response `[R] int32` to the prompt at this place ends with its last token, as at a stop string. It is
asked after each token."""


def ends_at(stops: Sequence[Sequence[str]], texts: StopStrings) -> IsOver | None:
    """Ends the response to each prompt with the token with which its text first holds one of the prompt's stop strings.

    Args:
        stops: the stop strings of each prompt.
    """
    if not any(stops):
        return None
    return lambda place, response: bool(stops[place]) and texts.reached(stops[place], response, 1)


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
    is_over: IsOver | None = None,
    prompt_lookup: int = 0,
) -> list[np.ndarray]:
    """Generates a response `[R] int32` to each prompt `[P] int32`, in the order of the prompts.

    A response ends with the first end-of-sequence token, which it includes, where `is_over` says so, or at
    `max_new_tokens`.

    Args:
        temperature: 0 decodes greedily; else the tokens are sampled from the whole vocabulary at this temperature.
        seed: seed of the sampling. A sampled response also depends on the prompts in the same batch.
        tokens: the rows of the vocabulary that are tokens; no other row is drawn. None: all rows.
        on_batch: called after each batch.
        prompt_lookup: above 0, as many tokens that followed the last ones earlier in the sequence are drafts, which one
            forward verifies (transformers' `prompt_lookup_num_tokens`); transformers wants batches of one for it.

    Raises:
        OpdlmError: the model's logits are not finite.
    """
    generation = GenerationConfig(eos_token_id=list(eos_ids), pad_token_id=eos_ids[0], do_sample=False)
    if prompt_lookup:
        generation.update(prompt_lookup_num_tokens=prompt_lookup)
    if temperature > 0:
        torch.manual_seed(wrapped(seed))  # transformers draws from the global generator
        generation.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    # transformers would merge in the settings of the model's folder (a repetition penalty, say) and change the
    # distribution, so the model gets ours for the time of the call.
    own, model.generation_config = model.generation_config, generation
    try:
        return _generate(
            model, prompts, max_new_tokens, eos_ids, batch_size, TokensOnly(model, tokens), on_batch, is_over
        )
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


class _Ends(StoppingCriteria):
    """Ends the rows of one batch where `is_over` says so.

    transformers' own `stop_strings` are the same for all rows of a call.

    Args:
        places: of the prompt of each row.
        prompt: length of the rows' prompts, padding included.
    """

    def __init__(self, is_over: IsOver, places: Sequence[int], prompt: int) -> None:
        self._is_over, self._places, self._prompt = is_over, places, prompt
        self.lengths: list[int | None] = [None] * len(places)
        """Response tokens of each row that has ended so."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`input_ids`: `[B, T]`; returns `[B]` bool, which rows end."""
        new = input_ids[:, self._prompt :].cpu().numpy().astype(np.int32)
        for row, (place, length) in enumerate(zip(self._places, self.lengths, strict=True)):
            if length is None and self._is_over(place, new[row]):
                self.lengths[row] = new.shape[1]
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


def _generate(
    model: Any,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    batch_size: int,
    tokens_only: TokensOnly,
    on_batch: OnBatch,
    is_over: IsOver | None,
) -> list[np.ndarray]:
    device = input_device(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, attended = left_padded([prompts[i] for i in batch])
        ends = _Ends(is_over or (lambda place, response: False), batch, ids.shape[1])
        output = model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(attended).to(device),
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([tokens_only]),
            stopping_criteria=StoppingCriteriaList([ends] if is_over else []),
        )
        for row, i in enumerate(batch):
            new = output[row, ids.shape[1] :][: ends.lengths[row]].cpu().numpy().astype(np.int32)
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
