"""Qwen3 as a block diffusion language model in SDAR's layout.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it. See block_causal.py for the differences
from the autoregressive network. SGLang and LMDeploy have implementations of their own for this architecture, and read
only the config and the weights.
"""

from __future__ import annotations

from transformers import Qwen3ForCausalLM

from .block_causal import BlockCausalMixin
from .block_decoding import BlockDecoding  # noqa: F401  transformers 4 copies only the files that this one names
from .configuration_sdar import SDARConfig
from .generation import Request  # noqa: F401


class SDARForCausalLM(BlockCausalMixin, Qwen3ForCausalLM):
    """Block diffusion on Qwen3."""

    config_class = SDARConfig
