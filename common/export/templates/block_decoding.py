"""Block decoding of a batch with a key-value cache: the `generate` of a block diffusion model.

Each row has its tokens at places of its own. They are shifted so that every block begins at a multiple of the block
size; one empty block lies in front. Then one forward serves all rows, whatever the lengths of their prompts:

    place     0 1 2 3 | 4 5 6 7 | 8 9 ...       block size 4, a prompt of 6 tokens
    absolute  . . . . | p p p p | p p m m       blocks are counted from the prompt's first token
    response  . . . . | . . p p | p p p p | m   the response begins a block

A forward runs the current block of each row. Where rows have finished a block since the last one, it runs the block
before it, too: its keys and values then are those of the finished tokens. This file needs torch and transformers only.
"""

from __future__ import annotations

from typing import Any

import torch

from .generation import Request, RowCache, forbidden_ids

STRATEGIES = ("low_confidence_dynamic", "sequential_dynamic")


class BlockDecoding:
    """Decodes the rows of one request; S is the block size, n the number of rows that have not ended.

    Args:
        model: has `attention_scores(seen)`, which turns a bool mask into what its attention takes.
        threshold: a step reveals every position whose probability is above it.
        strategy: and at least the most probable one (`low_confidence_dynamic`), or the first (`sequential_dynamic`).
        prefill_tokens: places of a row that go through the model at once when prompts are read.
    """

    def __init__(self, model: Any, request: Request, threshold: float, strategy: str, prefill_tokens: int) -> None:
        config, device = model.config, request.input_ids.device
        self._model, self._request, self._threshold = model, request, threshold
        self._in_order = strategy == "sequential_dynamic"
        self._size, self._mask_id = config.block_size, config.mask_token_id
        self._shift = getattr(config, "logit_shift", False)
        self._causal = getattr(config, "context", "block_causal") == "causal"
        self._forbidden = forbidden_ids(config, device)
        self._prefill_tokens = max(prefill_tokens // self._size, 1) * self._size
        size, lengths = self._size, torch.tensor([len(prompt) for prompt in request.prompts], device=device)
        to_grid = 0 * lengths if config.block_grid == "absolute" else -lengths % size
        self._offset = size + to_grid  # [n], place of position 0
        self._begin = self._offset + lengths  # [n], place of the response
        self._end = self._begin + request.max_new_tokens
        self._start = self._begin // size * size  # [n], place of the current block
        self._index = torch.arange(len(lengths), device=device)  # [n], row of the request
        self._tokens = request.input_ids.new_full((len(lengths), int(self._end.max()) + size), self._mask_id)
        for row, prompt in enumerate(request.prompts):
            self._tokens[row, self._offset[row] : self._begin[row]] = prompt
        self._cache = RowCache()

    def run(self) -> torch.Tensor:
        """Decodes all rows; returns `[B, P + R]` int64 (`Request.sequences`)."""
        responses: list[torch.Tensor] = [self._tokens[:0, 0]] * len(self._index)
        last = int(self._start.max()) - self._size  # the first step runs the block before the current one
        for first in range(self._size, last, self._prefill_tokens):
            places = torch.arange(first, min(first + self._prefill_tokens, last), device=self._tokens.device)
            self._forward(places.expand(len(self._index), -1), is_current=None)
        masked = self._window(self._size) >= self._begin[:, None]  # [n, S]
        moved = True
        kept: torch.Tensor | None = None  # [n, D], with a logit shift: hidden states before the current blocks
        while len(self._index):
            size = self._size
            places = self._window(2 * size if moved else size)
            hidden = self._forward(places, places >= self._start[:, None])
            if self._shift:
                kept = hidden[:, size - 1] if moved else kept
                hidden = torch.cat([kept[:, None], hidden[:, -size:-1]], dim=1)  # type: ignore[index]
            tokens, masked = self._reveal(hidden[:, -size:], masked)
            places = places[:, -size:]
            self._tokens.scatter_(1, places, tokens)
            is_response = places >= self._begin[:, None]
            ended = (torch.isin(tokens, self._request.eos_ids) & is_response).any(1) | (self._start + size >= self._end)
            done = ~masked.any(1)
            finished, moving = torch.stack([done & ended, done & ~ended]).cpu()
            moved = bool(moving.any())
            self._start += size * (done & ~ended)
            masked |= (done & ~ended)[:, None]
            if finished.any():
                for row in finished.nonzero()[:, 0].tolist():
                    response = self._tokens[row, self._begin[row] : self._end[row]]
                    responses[int(self._index[row])] = self._request.cut(response)
                rows = (~finished).nonzero()[:, 0].to(self._tokens.device)
                for name in ("_tokens", "_offset", "_begin", "_end", "_start", "_index"):
                    setattr(self, name, getattr(self, name)[rows])
                masked, kept = masked[rows], None if kept is None else kept[rows]
                self._cache.keep(rows)
        return self._request.sequences(responses)

    def _window(self, width: int) -> torch.Tensor:
        """The last `width` places to the end of each row's current block, `[n, width]` int64."""
        return self._start[:, None] + torch.arange(self._size - width, self._size, device=self._start.device)

    def _forward(self, places: torch.Tensor, is_current: torch.Tensor | None) -> torch.Tensor:
        """Hidden states `[n, Q, D]` of the tokens at `[n, Q]` places; writes their keys and values.

        Args:
            is_current: `[n, Q]` bool, the tokens of the current block, which see all of it. None: none of them is.
        """
        length = int(places.max()) + 1
        keys, query = torch.arange(length, device=places.device), places[..., None]
        seen = keys // self._size <= query // self._size
        if self._causal:
            seen &= keys <= query if is_current is None else (keys <= query) | is_current[..., None]
        # What lies before a row's first token sees itself, because a softmax over no keys gives NaN.
        seen &= (keys >= self._offset[:, None, None]) | (query < self._offset[:, None, None])
        self._cache.prepare(places, length)
        output = self._model.model(
            input_ids=self._tokens.gather(1, places),
            attention_mask=self._model.attention_scores(seen[:, None]),
            position_ids=(places - self._offset[:, None]).clamp(min=0),
            past_key_values=self._cache,
            use_cache=False,
        )
        return output.last_hidden_state

    def _reveal(self, hidden: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the current blocks: their tokens `[n, S]` int64, and what is still masked, `[n, S]` bool."""
        logits = self._model.lm_head(hidden[masked]).float()  # [m, V]
        logits[:, self._forbidden] = float("-inf")
        drawn = self._request.drawn(logits)
        confidence = torch.full(masked.shape, -1.0, device=masked.device)
        confidence[masked] = logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0].exp()
        revealed = masked & (confidence > self._threshold)
        certain = masked.float() if self._in_order else confidence  # argmax gives the first of equal values
        revealed.scatter_(1, certain.argmax(1, keepdim=True), True)
        candidates = torch.full_like(masked, self._mask_id, dtype=drawn.dtype).masked_scatter_(masked, drawn)
        tokens = torch.where(revealed, candidates, self._tokens.gather(1, self._window(self._size)))
        return tokens, masked & ~revealed
