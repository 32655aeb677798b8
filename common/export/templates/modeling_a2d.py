"""Qwen3, Qwen2 and Llama as block diffusion language models, with the names of the public A2D (AR-to-diffusion) models.

`AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)` loads one. See block_causal.py for the
differences from the autoregressive network.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .block_causal import BlockCausalMixin


class A2DQwen3Config(Qwen3Config):
    """Qwen3's config with block_size, block_grid and mask_token_id."""

    model_type = "a2d-qwen3"


class A2DQwen2Config(Qwen2Config):
    """Qwen2's config with block_size, block_grid and mask_token_id."""

    model_type = "a2d-qwen2"


class A2DLlamaConfig(LlamaConfig):
    """Llama's config with block_size, block_grid and mask_token_id."""

    model_type = "a2d-llama"


class A2DQwen3LMHeadModel(BlockCausalMixin, Qwen3ForCausalLM):
    """Block diffusion on Qwen3."""

    config_class = A2DQwen3Config


class A2DQwen2LMHeadModel(BlockCausalMixin, Qwen2ForCausalLM):
    """Block diffusion on Qwen2."""

    config_class = A2DQwen2Config


class A2DLlamaLMHeadModel(BlockCausalMixin, LlamaForCausalLM):
    """Block diffusion on Llama."""

    config_class = A2DLlamaConfig


class IsNotCausal:
    """Refuses to become a model: what `AutoModelForCausalLM` finds. List it before a model's class.

    Programs that ask for a causal model shift the logits and decode from left to right, which gives nonsense here.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "this is a block diffusion language model, not a causal one: load it with AutoModelForMaskedLM and "
            "trust_remote_code=True, whose generate() decodes block by block, or use opdlm generate"
        )


class A2DQwen3IsNotCausal(IsNotCausal, A2DQwen3LMHeadModel):
    """The refusal for Qwen3."""


class A2DQwen2IsNotCausal(IsNotCausal, A2DQwen2LMHeadModel):
    """The refusal for Qwen2."""


class A2DLlamaIsNotCausal(IsNotCausal, A2DLlamaLMHeadModel):
    """The refusal for Llama."""
