"""The config of SDAR-style checkpoints: Qwen3's config, with the fields that block decoding needs."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):
    """Qwen3's config with block_size, block_grid and mask_token_id."""

    model_type = "sdar"

    def __init__(self, **kwargs: Any) -> None:
        theta = kwargs.get("rope_theta")
        super().__init__(**kwargs)
        if theta is not None:
            self.rope_theta = theta  # SGLang reads it here; transformers 5 keeps it in rope_parameters only
