"""Reads the config.json of a checkpoint folder as data: supported model families only, no setting that chooses code.

A student is the same network as its teacher, with another attention mask and without a logit shift, so transformers'
own classes load it. Keys of config.json mark it as a student: `mask_token_id`, and where they are known `block_size`
and `block_grid`. The public checkpoints of OPDLM (`model_type: a2d-qwen3`) and SDAR are Qwen3 weights under other
names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from opdlm.common.errors import OpdlmError
from opdlm.common.files import read_json
from opdlm.common.model.end_tokens import GENERATION_KEYS, checked_end_tokens
from opdlm.common.model.families import check_attention, family_of

_IGNORED_KEYS = (
    "auto_map",  # names code beside the weights
    "attn_implementation",  # may name a kernel on the hub, which is code too
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "transformers_weights",  # would be loaded instead of the files that were checked
)
"""Keys of config.json that would choose code or other files; a checkpoint must not decide these."""

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""Names of the embedding and the output matrix `[V, D]` of all families; a tied model has the first one only."""

NARROWEST_FLEX_HEAD = 16
"""Numbers of a head's query that flex_attention's kernels for GPUs need at least."""


def head_width(config: Any) -> int:
    """Numbers of a head's query. `config`: of transformers."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def read_config(folder: str | Path) -> Any:
    """Returns the transformers config of a checkpoint folder; `a2d-*` and `sdar` become the family of their network.

    The attribute `is_diffusion_student` is added: whether config.json marks the model as a student.

    Raises:
        OpdlmError: the folder or its config.json does not exist, the folder holds an adapter, the family is not
            supported, a value has a wrong form, or a setting would make decoding with a cache differ from the training
            forward.
    """
    path = Path(folder)
    file = path / "config.json"
    if not path.is_dir():
        raise OpdlmError(f"model folder {path} does not exist; expected a checkpoint in Hugging Face layout")
    if not file.is_file():
        raise OpdlmError(f"model folder {path} has no config.json; expected a checkpoint in Hugging Face layout")
    if (path / "adapter_config.json").is_file():  # transformers would load the base model that it names
        raise OpdlmError(f"model folder {path} holds an adapter (adapter_config.json); expected a merged model")
    raw = read_json(file)
    family = family_of(raw.get("model_type"), file)
    left_out = {"model_type", "eos_token_id", *_IGNORED_KEYS, *GENERATION_KEYS}
    settings = {key: value for key, value in raw.items() if key not in left_out}
    try:
        config = AutoConfig.for_model(family, **settings)
    except (StrictDataclassError, AttributeError, TypeError, ValueError) as error:
        raise OpdlmError(f"{file} cannot be used: {' '.join(str(error).split())}") from None
    checked_end_tokens(raw.get("eos_token_id"), file, config.vocab_size)
    config.eos_token_id = raw.get("eos_token_id")  # a family's default may be an ordinary token of this vocabulary
    check_attention(config, file)
    config.is_diffusion_student = raw["model_type"] != family or raw.get("mask_token_id") is not None
    return config
