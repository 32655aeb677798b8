"""The layouts of model folders, without what it takes to write one (`opdlm.common.model.folder`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

LayoutName = Literal[
    "a2d-qwen3",
    "a2d-qwen2",
    "a2d-llama",
    "a2d-mistral",
    "a2d-phi3",
    "a2d-smollm3",
    "a2d-olmo2",
    "sdar",
    "qwen3",
    "qwen2",
    "llama",
    "mistral",
    "phi3",
    "smollm3",
    "olmo2",
]

TEMPLATES = Path(__file__).parent / "templates"
"""Folder of the code that a layout puts beside the weights."""
_DECODING = ("block_causal.py", "block_decoding.py", "generation.py")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a layout differs from a plain checkpoint of its model family."""

    family: str
    """transformers' `model_type` of the network."""
    architecture: str | None = None
    """Class of the model, for config.json. None: transformers' own class, which needs none of the fields below."""
    auto_map: dict[str, str] = field(default_factory=dict)
    """transformers' Auto class -> `file.Class` of the code in the folder."""
    files: tuple[str, ...] = ()
    """Files of `TEMPLATES` that are copied into the folder."""


def _a2d(family: str, prefix: str) -> Layout:
    model = f"{prefix}LMHeadModel"
    auto_map = {
        "AutoConfig": f"modeling_a2d.{prefix}Config",
        "AutoModelForMaskedLM": f"modeling_a2d.{model}",
        "AutoModelForCausalLM": f"modeling_a2d.{prefix}IsNotCausal",  # raises an error that says so
    }
    return Layout(family, model, auto_map, ("modeling_a2d.py", *_DECODING, "lossless.py", "verified_decoding.py"))


LAYOUTS: dict[LayoutName, Layout] = {
    "a2d-qwen3": _a2d("qwen3", "A2DQwen3"),
    "a2d-qwen2": _a2d("qwen2", "A2DQwen2"),
    "a2d-llama": _a2d("llama", "A2DLlama"),
    "a2d-mistral": _a2d("mistral", "A2DMistral"),
    "a2d-phi3": _a2d("phi3", "A2DPhi3"),
    "a2d-smollm3": _a2d("smollm3", "A2DSmolLM3"),
    "a2d-olmo2": _a2d("olmo2", "A2DOlmo2"),
    "sdar": Layout(
        "qwen3",
        "SDARForCausalLM",
        {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        ("configuration_sdar.py", "modeling_sdar.py", *_DECODING),
    ),
    "qwen3": Layout("qwen3"),
    "qwen2": Layout("qwen2"),
    "llama": Layout("llama"),
    "mistral": Layout("mistral"),
    "phi3": Layout("phi3"),
    "smollm3": Layout("smollm3"),
    "olmo2": Layout("olmo2"),
}
