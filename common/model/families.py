"""Which model families opdlm can train and decode, and why the others are refused: the one place that decides it.

A family is supported when four things hold. Its layers honour a 4-D attention mask, so that a block sees itself. A
token's keys and values depend on its position and on what it sees alone, so that decoding with a cache equals the
training forward. Its logits are `lm_head(hidden)` and its first hidden states are rows of the embedding, without a
further operation, because the learner does both itself. And its weight files hold its parameters under their own
names. `tests/common/model/test_families.py` shows the reasons for each refusal; the parity tests run every supported
family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opdlm.common.errors import OpdlmError

SUPPORTED_TYPES = ("qwen3", "qwen2", "llama", "mistral", "phi3", "smollm3", "olmo2")
"""Supported families, as transformers' `model_type`."""
A2D_PREFIX = "a2d-"
"""How the `model_type` of the public OPDLM and A2D (AR-to-diffusion) checkpoints begins."""
SDAR_TYPE = "sdar"
"""`model_type` of SDAR checkpoints: diffusion models with Qwen3's network."""

_EXPERTS = "a mixture of experts, whose weight files do not hold the model's own parameters"
_WINDOW = "some of its layers attend through a sliding window, which block-causal masks do not keep"
_LOGITS = "its logits are scaled or capped behind the output matrix"
_RECURRENT = "some of its layers are no attention, so a block could not see itself"
_REASONS = {
    "gemma": "its embedding layer scales what it looks up, which the learner does not",
    "gemma2": f"{_LOGITS}, and {_WINDOW}",
    **dict.fromkeys(("gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), _WINDOW),
    **dict.fromkeys(("olmo3", "ministral", "exaone4", "cohere2"), _WINDOW),
    **dict.fromkeys(("granite", "cohere"), _LOGITS),
    **dict.fromkeys(("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "phimoe", "gpt_oss", "granitemoe"), _EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe", "minimax_m2", "llama4", "llama4_text"), _EXPERTS),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_next", "lfm2", "mamba", "mamba2", "jamba"), _RECURRENT),
}
"""Known families that are refused: why."""
_WINDOWED = ("mistral", "phi3")
"""Families whose layers all have the config's `sliding_window`; the others say it by layer."""


def family_of(model_type: object, file: Path) -> str:
    """The family of a config.json's `model_type`; `a2d-*` and `sdar` become the family of their network.

    Raises:
        OpdlmError: it is not supported; the line says why, where that is known, and which are.
    """
    named = str(model_type or "")
    family = "qwen3" if named == SDAR_TYPE else named.removeprefix(A2D_PREFIX)
    if family not in SUPPORTED_TYPES:
        reason = f" ({_REASONS[family]})" if family in _REASONS else ""
        raise OpdlmError(
            f"{file}: model_type is {model_type!r}{reason}; supported: "
            + ", ".join([*(f"{t}, {A2D_PREFIX}{t}" for t in SUPPORTED_TYPES), SDAR_TYPE])
        )
    return family


def check_attention(config: Any, file: Path) -> None:
    """Checks that a cache decodes as the training forward computes: no sliding window, rotations by position alone.

    A window that is no shorter than the model's context hides nothing; it is set to None.

    Args:
        config: transformers config of a supported family.
        file: config.json, for the error.

    Raises:
        OpdlmError: a layer has a shorter window, or the rotation changes with the sequence's length.
    """
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise OpdlmError(f"{file}: use_sliding_window is on; expected a model without one, for block-causal masks")
    if config.model_type in _WINDOWED and config.sliding_window is not None:
        if config.sliding_window < config.max_position_embeddings:
            raise OpdlmError(
                f"{file}: sliding_window is {config.sliding_window}, shorter than the context of "
                f"{config.max_position_embeddings} tokens, and block-causal masks do not keep it; expected a model "
                "without one. For texts that are never longer than the window, set max_position_embeddings to it"
            )
        config.sliding_window = None
    rope = config.rope_parameters["rope_type"]
    if rope in ("dynamic", "longrope"):
        raise OpdlmError(
            f"{file}: rope_type is {rope!r}, whose rotation changes with the sequence's length, so keys in the "
            "cache would be wrong; expected one that depends on the position alone (default, linear, yarn, llama3)"
        )
