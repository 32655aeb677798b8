"""Causal language models as block diffusion models, with the names of the public A2D (AR-to-diffusion) models.

`AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)` loads one. See block_causal.py for the
differences from the autoregressive network, and lossless.py for models with adapters on noisy tokens alone.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from .block_causal import BlockCausalMixin
from .block_decoding import BlockDecoding  # noqa: F401  transformers 4 copies only the files that this one names
from .generation import Request  # noqa: F401
from .lossless import LosslessMixin
from .verified_decoding import VerifiedDecoding  # noqa: F401


class A2DQwen3Config(Qwen3Config):
    """Qwen3's config with block_size, block_grid and mask_token_id."""

    model_type = "a2d-qwen3"


class A2DQwen2Config(Qwen2Config):
    """Qwen2's config with block_size, block_grid and mask_token_id."""

    model_type = "a2d-qwen2"


class A2DLlamaConfig(LlamaConfig):
    """Llama's config with block_size, block_grid and mask_token_id."""

    model_type = "a2d-llama"


class A2DMistralConfig(MistralConfig):
    """Mistral's config with block_size, block_grid and mask_token_id."""

    model_type = "a2d-mistral"


class A2DPhi3Config(Phi3Config):
    """Phi3's config with block_size, block_grid and mask_token_id."""

    model_type = "a2d-phi3"


class A2DSmolLM3Config(SmolLM3Config):
    """SmolLM3's config with block_size, block_grid and mask_token_id."""

    model_type = "a2d-smollm3"


class A2DOlmo2Config(Olmo2Config):
    """Olmo2's config with block_size, block_grid and mask_token_id."""

    model_type = "a2d-olmo2"


class A2DQwen3LMHeadModel(LosslessMixin, BlockCausalMixin, Qwen3ForCausalLM):
    """Block diffusion on Qwen3."""

    config_class = A2DQwen3Config


class A2DQwen2LMHeadModel(LosslessMixin, BlockCausalMixin, Qwen2ForCausalLM):
    """Block diffusion on Qwen2."""

    config_class = A2DQwen2Config


class A2DLlamaLMHeadModel(LosslessMixin, BlockCausalMixin, LlamaForCausalLM):
    """Block diffusion on Llama."""

    config_class = A2DLlamaConfig


class A2DMistralLMHeadModel(LosslessMixin, BlockCausalMixin, MistralForCausalLM):
    """Block diffusion on Mistral."""

    config_class = A2DMistralConfig


class A2DPhi3LMHeadModel(LosslessMixin, BlockCausalMixin, Phi3ForCausalLM):
    """Block diffusion on Phi3."""

    config_class = A2DPhi3Config


class A2DSmolLM3LMHeadModel(LosslessMixin, BlockCausalMixin, SmolLM3ForCausalLM):
    """Block diffusion on SmolLM3."""

    config_class = A2DSmolLM3Config


class A2DOlmo2LMHeadModel(LosslessMixin, BlockCausalMixin, Olmo2ForCausalLM):
    """Block diffusion on Olmo2."""

    config_class = A2DOlmo2Config


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


class A2DMistralIsNotCausal(IsNotCausal, A2DMistralLMHeadModel):
    """The refusal for Mistral."""


class A2DPhi3IsNotCausal(IsNotCausal, A2DPhi3LMHeadModel):
    """The refusal for Phi3."""


class A2DSmolLM3IsNotCausal(IsNotCausal, A2DSmolLM3LMHeadModel):
    """The refusal for SmolLM3."""


class A2DOlmo2IsNotCausal(IsNotCausal, A2DOlmo2LMHeadModel):
    """The refusal for Olmo2."""
