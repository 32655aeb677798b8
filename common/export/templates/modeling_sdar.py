"""SDAR-style block diffusion on Qwen3: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

See block_causal.py for what differs from the autoregressive network. SGLang and LMDeploy have networks of their own
for this architecture and read the config and the weights only.
"""

from __future__ import annotations

from transformers import Qwen3ForCausalLM

from .block_causal import BlockCausalMixin
from .configuration_sdar import SDARConfig


class SDARForCausalLM(BlockCausalMixin, Qwen3ForCausalLM):
    """Block diffusion on Qwen3."""

    config_class = SDARConfig
