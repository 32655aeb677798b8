"""What `generate` of transformers takes and returns, for models that decode several tokens at a time.

`read_request` reads the arguments, `Request.sequences` makes the result, and `RowCache` holds keys and values of rows
that advance independently. This file needs torch and transformers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import logging

logger = logging.get_logger(__name__)

DEFAULT_NEW_TOKENS = 64
_KNOWN = ("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id")
_WITHOUT_EFFECT = ("bos_token_id", "use_cache", "transformers_version", "_from_model_config")
_NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
}
"""Options of transformers that block decoding does not have: the values that ask for nothing."""


@dataclass(frozen=True)
class Request:
    """A call of `generate`."""

    prompts: list[torch.Tensor]
    """Token ids `[P]` int64 of each row, without its padding."""
    input_ids: torch.Tensor
    """`[B, P]` int64, as given."""
    max_new_tokens: int
    eos_ids: torch.Tensor
    """`[E]` int64, tokens that end a response."""
    pad_id: int
    """What fills rows that end early."""
    warpers: LogitsProcessorList | None
    """Temperature, top-k and top-p. None: greedy."""

    def drawn(self, logits: torch.Tensor) -> torch.Tensor:
        """A token for each row of logits `[m, V]`: `[m]` int64; the likeliest, or one drawn with torch's generator."""
        if self.warpers is None or not len(logits):
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1)[:, 0]

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution that tokens are drawn from: `[m, V]` float32 of logits `[m, V]`."""
        return self.warpers(None, logits).softmax(-1)  # type: ignore[misc]

    def cut(self, response: torch.Tensor) -> torch.Tensor:
        """A response `[R]` to its first end-of-sequence token, or to the limit."""
        response = response[: self.max_new_tokens]
        ends = torch.isin(response, self.eos_ids).nonzero()
        return response[: int(ends[0]) + 1] if len(ends) else response

    def sequences(self, responses: list[torch.Tensor]) -> torch.Tensor:
        """The result: `[B, P + R]` int64, the given rows with their responses, padded on the right."""
        longest = max(len(response) for response in responses)
        padded = [functional.pad(ids, (0, longest - len(ids)), value=self.pad_id) for ids in responses]
        return torch.cat([self.input_ids, torch.stack(padded).to(self.input_ids.device)], dim=1)


def read_request(model: Any, given: dict[str, Any]) -> Request:
    """Reads the arguments of `generate`: those that are named, over `generation_config`, over the model's own.

    Raises:
        ValueError: an argument is unknown or impossible, padding is not on the left, or the context is too short.
    """
    given = {name: value for name, value in given.items() if value is not None}
    ids = given.pop("inputs", None) if "input_ids" not in given else given.pop("input_ids")
    real = given.pop("attention_mask", None)
    named = model.generation_config.to_diff_dict()
    if "generation_config" in given:
        named |= given.pop("generation_config").to_diff_dict()
    named |= given
    for name, value in named.items():
        if name not in (*_KNOWN, *_WITHOUT_EFFECT) and value not in (None, False, [], _NEUTRAL.get(name)):
            raise ValueError(f"generate: {name}: found {value!r}; this model decodes blocks and knows: {_KNOWN}")
    if ids is None or ids.dim() != 2 or 0 in ids.shape:
        raise ValueError("generate: input_ids: expected token ids [B, P], at least one in each row")
    prompts = _without_padding(ids, real)
    longest = max(len(prompt) for prompt in prompts)
    limit = named.get("max_new_tokens")
    if limit is None:
        limit = named["max_length"] - ids.shape[1] if named.get("max_length") else DEFAULT_NEW_TOKENS
    if limit < 1:
        raise ValueError(f"generate: {limit} new tokens are asked for (max_new_tokens, max_length); expected 1 or more")
    if longest + limit > (context := model.config.max_position_embeddings):
        raise ValueError(
            f"generate: {longest} prompt tokens and {limit} new ones are more than the context of {context} tokens; "
            f"expected max_new_tokens of at most {context - longest}"
        )
    ends = named.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    pad = named.get("pad_token_id")
    pad = (ends[0] if ends else 0) if pad is None else pad
    stops = torch.tensor(ends, dtype=torch.int64, device=ids.device)
    return Request(prompts, ids, int(limit), stops, pad, _warpers(named))


def _without_padding(ids: torch.Tensor, real: torch.Tensor | None) -> list[torch.Tensor]:
    if real is None:
        return list(ids)
    if real.shape != ids.shape:
        raise ValueError(f"generate: attention_mask is {list(real.shape)}; expected {list(ids.shape)}, as input_ids")
    real = real.bool()
    if not real[:, -1].all() or (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError(
            "generate: attention_mask hides tokens behind others, or a whole row; expected padding on the left only "
            '(tokenizer.padding_side = "left")'
        )
    return [row[seen] for row, seen in zip(ids, real, strict=True)]


def _warpers(named: dict[str, Any]) -> LogitsProcessorList | None:
    sampling = {name: named[name] for name in ("temperature", "top_k", "top_p") if named.get(name) is not None}
    if not named.get("do_sample"):
        if sampling:
            logger.warning_once(f"generate: {', '.join(sampling)} have no effect without do_sample=True")
        return None
    made = LogitsProcessorList()
    if "temperature" in sampling:
        made.append(TemperatureLogitsWarper(float(sampling["temperature"])))  # refuses 0: that is do_sample=False
    if sampling.get("top_k"):
        made.append(TopKLogitsWarper(sampling["top_k"]))
    if sampling.get("top_p", 1.0) < 1.0:
        made.append(TopPLogitsWarper(float(sampling["top_p"])))
    return made


class RowCache:
    """Keys and values of rows, each of which writes at places of its own. Models take it as `past_key_values`."""

    def __init__(self) -> None:
        self._layers: list[list[torch.Tensor]] = []
        self._places: torch.Tensor
        self._length = 0

    def prepare(self, places: torch.Tensor, length: int) -> None:
        """Says where the next forward writes its tokens, `[B, Q]` int64, and how many places it attends to."""
        self._places, self._length = places, length

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values `[B, H, Q, D]` of a layer; returns those to attend to, `[B, H, length, D]`."""
        if layer == len(self._layers):
            self._layers.append([keys[:, :, :0], values[:, :, :0]])
        held, places = self._layers[layer], self._places.to(keys.device)
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        for i, new in enumerate((keys, values)):
            if (room := held[i].shape[2]) < self._length:  # what is hidden counts 0 times, so it must not be NaN
                held[i] = functional.pad(held[i], (0, 0, 0, self._length + room // 2 + 64 - room))
            held[i][rows, :, places] = new.transpose(1, 2)
        return held[0][:, :, : self._length], held[1][:, :, : self._length]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """0: positions and masks are given."""
        return 0

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all rows but these, `[n]` int64."""
        for held in self._layers:
            held[:] = [tensor[rows.to(tensor.device)] for tensor in held]


def forbidden_ids(config: Any, device: torch.device) -> torch.Tensor:
    """Ids that are never drawn, `[n]` int64: the mask token, and rows of the vocabulary that no token has."""
    spare = [torch.arange(*ids) for ids in getattr(config, "spare_token_ids", None) or []]
    return torch.cat([torch.tensor([config.mask_token_id]), *spare]).to(device)
