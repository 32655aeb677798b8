"""The config.json of a checkpoint folder, read as data: families that are supported, nothing that would choose code.

A student is the same network as its teacher with another attention mask and no logit shift, so its weights and modules
are those of transformers. Keys of config.json make it a student: `mask_token_id`, and where known `block_size` and
`block_grid`. The public OPDLM checkpoints (`model_type: a2d-qwen3`) and SDAR's are Qwen3 weights under other names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from opdlm.common.errors import OpdlmError
from opdlm.common.files import read_json

A2D_PREFIX = "a2d-"
_NOT_FROM_A_FILE = (
    "auto_map",  # names code beside the weights
    "attn_implementation",  # may name a kernel on the hub, which is code too
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "transformers_weights",  # would be loaded instead of the files that were checked
)
"""Keys of config.json that would choose code or files; a checkpoint has no say in these."""
SUPPORTED_TYPES = ("qwen3", "qwen2", "llama")
"""Families whose forward takes our 4-D masks and whose logits are `lm_head(hidden)` and nothing more."""
SDAR_TYPE = "sdar"  # Qwen3's network, diffusion checkpoints only

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""The two matrices with a row per token, by their names in all three families; a tied model has the first."""


def read_config(folder: str | Path) -> Any:
    """The transformers config of a checkpoint folder; `a2d-qwen3` and `sdar` are read as the Qwen3 that they are.

    Raises:
        OpdlmError: no such folder, no config.json, an adapter's folder, a family that is not supported, or a setting
            of it under which decoding with a cache and the training forward could not agree.
    """
    path = Path(folder)
    file = path / "config.json"
    if not path.is_dir():
        raise OpdlmError(f"model folder {path} does not exist; expected a checkpoint in Hugging Face layout")
    if not file.is_file():
        raise OpdlmError(f"model folder {path} has no config.json; expected a checkpoint in Hugging Face layout")
    if (path / "adapter_config.json").is_file():  # transformers would load the base model that it names instead
        raise OpdlmError(f"model folder {path} holds an adapter (adapter_config.json); expected a merged model")
    raw = read_json(file)
    named = str(raw.get("model_type", ""))
    family = "qwen3" if named == SDAR_TYPE else named.removeprefix(A2D_PREFIX)
    if family not in SUPPORTED_TYPES:
        raise OpdlmError(
            f"{file}: model_type is {raw.get('model_type')!r}; supported: "
            + ", ".join([*(f"{t}, {A2D_PREFIX}{t}" for t in SUPPORTED_TYPES), SDAR_TYPE])
        )
    settings = {key: value for key, value in raw.items() if key not in ("model_type", *_NOT_FROM_A_FILE)}
    config = AutoConfig.for_model(family, **settings)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise OpdlmError(f"{file}: use_sliding_window is on; a sliding window has no block-causal counterpart here")
    rope = config.rope_parameters["rope_type"]
    if rope in ("dynamic", "longrope"):
        raise OpdlmError(
            f"{file}: rope_type is {rope!r}, whose rotation changes with the sequence's length, so that keys in a "
            "cache grow wrong; expected one that depends on the position alone (default, linear, yarn, llama3)"
        )
    config.is_diffusion_student = raw["model_type"] != family or raw.get("mask_token_id") is not None
    return config
