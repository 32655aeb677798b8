"""A student under the names by which other programs know its kind.

`a2d-*`: the public OPDLM and A2D checkpoints' (`AutoModelForMaskedLM`, with code beside the weights). `sdar`: what
SGLang and LMDeploy serve. `qwen3`, `qwen2`, `llama`: the plain network, for what brings masks of its own. Weight files
are the same bytes in all of them; `common/export/templates` holds the code that goes with the first two.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opdlm.common.errors import OpdlmError
from opdlm.common.export.card import Card, write_card
from opdlm.common.files import atomic_folder, refuse_existing
from opdlm.common.model.config import read_config
from opdlm.common.model.convert import check_tensors, tied_copies, write_config, write_generation_config
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.shards import copy_shards, read_shards
from opdlm.common.model.tokenizer import load_tokenizer

TEMPLATES = Path(__file__).parent / "templates"

LayoutName = Literal["a2d-qwen3", "a2d-qwen2", "a2d-llama", "sdar", "qwen3", "qwen2", "llama"]

ENGINE_MASK_ID, ENGINE_BLOCK_SIZE = 151669, 4
"""What SGLang (`dllm/config.py`) and LMDeploy (`configurations/sdar.py`) take for every `SDARForCausalLM`: the mask
token without asking the config, the block size unless told otherwise at start."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a layout changes in a plain checkpoint of its family."""

    family: str
    """transformers' model type of the network."""
    architecture: str | None = None
    """None keeps transformers' own classes: nothing below is then needed."""
    auto_map: dict[str, str] = field(default_factory=dict)
    """transformers' Auto class -> `file.Class` in the folder."""
    files: tuple[str, ...] = ()


def _a2d(family: str, prefix: str) -> Layout:
    model = f"{prefix}LMHeadModel"
    auto_map = {"AutoConfig": f"modeling_a2d.{prefix}Config", "AutoModelForMaskedLM": f"modeling_a2d.{model}"}
    return Layout(family, model, auto_map, ("modeling_a2d.py", "block_causal.py"))


LAYOUTS: dict[LayoutName, Layout] = {
    "a2d-qwen3": _a2d("qwen3", "A2DQwen3"),
    "a2d-qwen2": _a2d("qwen2", "A2DQwen2"),
    "a2d-llama": _a2d("llama", "A2DLlama"),
    "sdar": Layout(
        "qwen3",
        "SDARForCausalLM",
        {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        ("configuration_sdar.py", "modeling_sdar.py", "block_causal.py"),
    ),
    "qwen3": Layout("qwen3"),
    "qwen2": Layout("qwen2"),
    "llama": Layout("llama"),
}


def export(source: str | Path, destination: str | Path, layout: LayoutName, base_model: str | None = None) -> list[str]:
    """Writes a student in a public layout, with its model card; returns what the user should know, a line each.

    Args:
        base_model: hub id of the autoregressive model, for the card; None takes the name that the run knows.

    Raises:
        OpdlmError: unusable source, no student, a layout of another family, or a destination that exists. Nothing is
            written then.
    """
    source, destination, target = Path(source), Path(destination), LAYOUTS[layout]
    refuse_existing("export", destination)
    config, facts = read_config(source), read_facts(source)
    if config.model_type != target.family:
        fitting = ", ".join(name for name, other in LAYOUTS.items() if other.family == config.model_type)
        raise OpdlmError(f"--layout: found {layout}, but {source} is a {config.model_type}; it can be: {fitting}")
    mask_id = require_mask(facts)
    if facts.block_size is None:
        raise OpdlmError(
            f"{source}/config.json names no block_size; write one: opdlm convert {source} DST --block-size N"
        )
    config.update(
        {"mask_token_id": mask_id, "block_size": facts.block_size, "block_grid": facts.block_grid or "absolute"}
    )
    tokenizer, shards = load_tokenizer(source), read_shards(source)
    check_tensors(config, shards)
    card = Card(source, layout, config, target.auto_map, base_model)
    with atomic_folder(destination) as folder:
        copy_shards(shards, folder, {}, tied_copies(config, shards))
        write_config(config, shards, folder)
        write_generation_config(source, config, folder)
        tokenizer.save_pretrained(folder)
        if target.architecture:
            _rename(folder / "config.json", layout, target)
        for name in target.files:
            shutil.copyfile(TEMPLATES / name, folder / name)
        warnings = engine_warnings(config) if layout == "sdar" else []
        write_card(card, warnings, folder / "README.md")
    return warnings


def engine_warnings(config: Any) -> list[str]:
    """In what a student differs from what SGLang and LMDeploy take for granted, and what to do about it."""
    lines = []
    if config.mask_token_id != ENGINE_MASK_ID:
        lines.append(
            f"the mask token id is {config.mask_token_id}, but SGLang and LMDeploy take {ENGINE_MASK_ID} for every "
            "SDAR model and cannot serve this one; transformers can load it"
        )
    if config.block_grid != "absolute":
        lines.append(
            f"the block grid is {config.block_grid!r}, but SGLang and LMDeploy count blocks from the first prompt "
            "token (the absolute grid); served there it decodes states that it was not trained on"
        )
    if config.block_size != ENGINE_BLOCK_SIZE:
        lines.append(
            f"the block size is {config.block_size}, not {ENGINE_BLOCK_SIZE}; tell SGLang (block_size in the file of "
            "--dllm-algorithm-config) and LMDeploy (dllm_block_length)"
        )
    return lines


def _rename(file: Path, layout: str, target: Layout) -> None:
    """config.json as transformers 4 writes it, which 5 reads too and engines with a pinned 4 understand."""
    raw: dict[str, Any] = json.loads(file.read_text())
    rope = dict(raw.pop("rope_parameters"))
    raw |= {
        "model_type": layout,
        "architectures": [target.architecture],
        "auto_map": target.auto_map,
        "rope_theta": rope.pop("rope_theta"),
        "torch_dtype": raw.pop("dtype"),
    }
    if rope["rope_type"] != "default":
        raw["rope_scaling"] = rope
    file.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
