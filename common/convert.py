"""AR checkpoint -> student checkpoint: the same weights, a mask token, and the block layout in config.json.

Where the tokenizer has no mask token, `<|MASK|>` is added. If the embedding matrix has spare rows (Qwen3 has), its id
is one of them; else one row is appended. Either way no logit of an existing token changes. Layouts: `qwen3` is what
plain transformers loads; `a2d-qwen3` is the name under which public OPDLM checkpoints come.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from common.errors import OpdlmError
from common.models import load_model, load_tokenizer, read_config

MASK_TOKEN = "<|MASK|>"
Layout = Literal["qwen3", "a2d-qwen3"]


def convert(source: str | Path, destination: str | Path, block_size: int, block_grid: str, layout: Layout) -> int:
    """Writes a student checkpoint; returns its mask token id.

    The destination appears whole or not at all.

    Raises:
        OpdlmError: unusable source, or a destination that exists.
    """
    destination = Path(destination)
    if destination.exists():
        raise OpdlmError(f"convert: {destination} exists; give a new folder (nothing was written)")
    read_config(source)
    tokenizer = load_tokenizer(source)
    # Weights keep the format they are stored in.
    model = load_model(source, dtype="auto")
    mask_id = add_mask_token(model, tokenizer)
    model.config.update({"mask_token_id": mask_id, "block_size": block_size, "block_grid": block_grid})
    save_model(model, tokenizer, destination, layout)
    return mask_id


def add_mask_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Makes sure that tokenizer and embedding have a mask token; returns its id."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    mask_id = int(tokenizer.mask_token_id)
    rows = model.get_input_embeddings().num_embeddings
    if mask_id >= rows:
        if mask_id > rows:
            raise OpdlmError(
                f"convert: the tokenizer gives the mask token id {mask_id}, but the embedding has {rows} rows; "
                "a tokenizer with more tokens than the model has rows is not one this model was trained with"
            )
        model.resize_token_embeddings(rows + 1, mean_resizing=False)
        with torch.no_grad():
            for matrix in {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
                matrix.weight[mask_id] = matrix.weight[:rows].float().mean(0).to(matrix.weight.dtype)
    return mask_id


def save_model(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, destination: Path, layout: Layout = "qwen3"
) -> None:
    """Saves in Hugging Face layout through a temporary folder and one rename."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = destination.with_name(f".{destination.name}.{os.getpid()}")
    try:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        _finish_config(staging / "config.json", layout)
        staging.rename(destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _finish_config(file: Path, layout: Layout) -> None:
    raw = json.loads(file.read_text())
    raw.pop("is_diffusion_student", None)  # ours, derived on reading
    if layout == "a2d-qwen3":
        raw |= {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]}
        rope = raw.get("rope_parameters") or {}
        raw.setdefault("rope_theta", rope.get("rope_theta"))  # where the public checkpoints, of transformers 4, have it
    file.write_text(json.dumps(raw, indent=2) + "\n")
