"""Block-causal attention, for causal language models of transformers.

A block diffusion language model has the network of its autoregressive teacher with two differences: a token sees every
token of its own block and of earlier blocks, and the logits at position i predict token i, which is a mask token until
it is decoded. Two settings of the config take one of the differences away each. With `context: causal`, a token sees
the tokens before it, and only in the last block, while that holds a mask token, its whole block. With `logit_shift:
true`, the logits at position i predict token i + 1. Decoding is in block_decoding.py. These files need torch and
transformers only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .block_decoding import STRATEGIES, BlockDecoding
from .generation import read_request


class BlockCausalMixin(nn.Module):
    """Turns a `...ForCausalLM` class of transformers into a block diffusion model; list it before that class.

    It reads block_size, block_grid, mask_token_id, context, logit_shift and decoding_order from the config. With
    block_grid `absolute`, blocks are counted from the first token. With `response`, the response starts a new block, so
    blocks are counted back from the last token, and the input must end with a whole block, as it does in decoding.
    """

    config: Any
    generation_config: Any
    prefill_tokens = 512
    """Tokens of each prompt that `generate` reads in one forward: its attention mask is `[B, 1, 512, P]`."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Computes logits; those at position i predict token i, or token i + 1 with a logit shift.

        Args:
            input_ids: `[B, T]` int64, with the mask token at each position to predict.
            attention_mask: `[B, 1, T, K]` is used as it is (bool: True where the query sees the key; float: added to
                the scores). `[B, K]` (1 for a token, 0 for padding) or None gives the block-causal mask.
            position_ids: `[B, T]` int64; by default they count from each row's first token.
            labels: `[B, T]` int64, -100 where there is no loss; a label is compared with the logits that predict it.
        """
        if attention_mask is None or attention_mask.dim() == 2:
            rows, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]  # type: ignore[union-attr]
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            attention_mask, counted = self._block_causal(attention_mask, input_ids, rows, past, length)
            position_ids = counted if position_ids is None else position_ids
        attention_mask = self.attention_scores(attention_mask)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if labels is not None:
            logits = output.logits
            if self._shift:
                logits, labels = logits[:, :-1], labels[:, 1:]
            output.loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return output

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        threshold: float = 0.9,
        strategy: str | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """Decodes a batch block by block, with a key-value cache.

        Each step unmasks every position whose probability is above `threshold`, and at least one.

        Args:
            inputs: `[B, P]` int64, prompts; or named `input_ids`. Padding is on the left, as `attention_mask` says.
            generation_config: settings of transformers; those that are named in the call come before it.
            threshold: within 0 and 1; a lower one decodes more tokens a step.
            strategy: which position is unmasked where none is above the threshold. `low_confidence_dynamic`: the most
                probable one. `sequential_dynamic`: the first one, with the others above the threshold beside it. None:
                the second one if config.json has the decoding_order `sequential`, else the first one.
            settings: `attention_mask` (`[B, P]`, 0 for padding), `max_new_tokens` (64), `max_length`, `do_sample`
                (False: greedy), `temperature`, `top_k`, `top_p`, `eos_token_id`, `pad_token_id`. Sampling draws from
                torch's generator.

        Returns: `[B, P + R]` int64, prompts and responses, each to its first end-of-sequence token or to the limit, and
            padded on the right.

        Raises:
            ValueError: an argument is unknown or impossible, or padding is not on the left.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"generate: threshold: found {threshold}; expected a number within 0 and 1")
        if strategy is None:
            strategy = STRATEGIES[getattr(self.config, "decoding_order", "confidence") == "sequential"]
        if strategy not in STRATEGIES:
            raise ValueError(f"generate: strategy: found {strategy!r}; expected {' or '.join(STRATEGIES)}")
        request = read_request(self, {"inputs": inputs, "generation_config": generation_config, **settings})
        return BlockDecoding(self, request, threshold, strategy, self.prefill_tokens).run()

    def attention_scores(self, seen: torch.Tensor) -> torch.Tensor:
        """What the model's attention takes for a bool mask `[B, 1, T, K]`, True where the query sees the key."""
        implementation = self.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(f"attn_implementation is {implementation!r}; block-causal masks need 'sdpa' or 'eager'")
        if implementation == "sdpa" or seen.dtype != torch.bool:
            return seen
        dtype = next(self.parameters()).dtype  # eager adds the mask to the scores
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    @property
    def _shift(self) -> bool:
        return getattr(self.config, "logit_shift", False)

    def _block_causal(
        self, real: torch.Tensor | None, ids: torch.Tensor | None, rows: int, past: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mask `[B, 1, T, K]` bool and the positions `[B, T]` int64 of the last T of K columns.

        Args:
            real: `[B, K]`, 1 for a token and 0 for padding; None where there is no padding.
            ids: `[B, T]`, the tokens of the last T columns; needed with causal context.
        """
        columns = past + length
        device = next(self.parameters()).device
        real = torch.ones(rows, columns, device=device) if real is None else real
        if real.shape != (rows, columns):
            raise ValueError(f"attention_mask is {list(real.shape)}; expected {[rows, columns]}, or four dimensions")
        real = real.bool()
        positions = (real.cumsum(1) - 1).clamp(min=0)
        size = self.config.block_size
        offset = 0 if self.config.block_grid == "absolute" else -real.sum(1, keepdim=True) % size
        blocks = torch.div(positions + offset, size, rounding_mode="floor")
        seen = blocks[:, None, :] <= blocks[:, past:, None]
        if getattr(self.config, "context", "block_causal") == "causal":
            if ids is None:
                raise ValueError("with causal context, give input_ids or a mask of four dimensions")
            in_last = blocks[:, past:] == blocks[:, -1:]
            is_open = ((ids == self.config.mask_token_id) & in_last).any(1, keepdim=True)
            seen &= (is_open & in_last)[:, :, None] | (positions[:, None, :] <= positions[:, past:, None])
        seen &= real[:, None, :]
        # A padding token sees itself, because a softmax over no keys gives NaN.
        seen |= torch.eye(columns, dtype=torch.bool, device=seen.device)[past:]
        return seen[:, None], positions[:, past:]
