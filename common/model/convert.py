"""AR checkpoint -> student checkpoint: the same weights, a mask token, and the block layout in config.json.

Where the tokenizer has no mask token, `<|MASK|>` is added. If the embedding matrix has spare rows (Qwen3 has), its id
is one of them; else one row is appended. Either way no logit of an existing token changes. Weight files are copied as
bytes; only the ones with a matrix that grows are written anew, so a model of any size converts in the memory of one
matrix. What other programs read is written by `opdlm.common.export`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from opdlm.common.errors import OpdlmError
from opdlm.common.files import atomic_folder, refuse_existing
from opdlm.common.model.config import EMBEDDING, OUTPUT, read_config
from opdlm.common.model.shards import Shards, copy_shards, read_shards
from opdlm.common.model.tokenizer import load_tokenizer

MASK_TOKEN = "<|MASK|>"


def convert(source: str | Path, destination: str | Path, block_size: int, block_grid: str) -> int:
    """Writes a student checkpoint; returns its mask token id.

    The destination appears whole or not at all.

    Raises:
        OpdlmError: unusable source, or a destination that exists.
    """
    destination = Path(destination)
    refuse_existing("convert", destination)
    config, tokenizer, shards = read_config(source), load_tokenizer(source), read_shards(source)
    check_tensors(config, shards)
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    mask_id = int(tokenizer.mask_token_id)
    rows = mask_rows(shards, mask_id)
    config.vocab_size += bool(rows)
    config.update({"mask_token_id": mask_id, "block_size": block_size, "block_grid": block_grid})
    with atomic_folder(destination) as folder:
        copy_shards(shards, folder, rows, tied_copies(config, shards) if rows else frozenset())
        write_config(config, shards, folder)
        write_generation_config(Path(source), config, folder)
        tokenizer.save_pretrained(folder)
    return mask_id


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase | None, destination: Path) -> None:
    """Saves a model that is in memory, in Hugging Face layout, through a temporary folder and one rename."""
    with atomic_folder(destination) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        finish_config(folder / "config.json")


def mask_rows(shards: Shards, mask_id: int) -> dict[str, torch.Tensor]:
    """The row `[D]` that each of embedding and output matrix needs for the mask token: the mean of the others.

    Empty where the mask token has a row already.
    """
    have = shards.shape(EMBEDDING)[0]
    if mask_id < have:
        return {}
    if mask_id > have:
        raise OpdlmError(
            f"convert: the tokenizer gives the mask token id {mask_id}, but the embedding has {have} rows; "
            "a tokenizer with more tokens than the model has rows is not one this model was trained with"
        )
    rows = {}
    for name in (EMBEDDING, OUTPUT):
        if name in shards.file_of:
            matrix = shards.load(name)
            rows[name] = matrix.float().mean(0).to(matrix.dtype)
    return rows


def tied_copies(config: Any, shards: Shards) -> frozenset[str]:
    """A tied model's output matrix where it is stored a second time, as the public Qwen3-0.6B does."""
    return frozenset({OUTPUT} & shards.file_of.keys() if config.tie_word_embeddings else ())


def check_tensors(config: Any, shards: Shards) -> None:
    """Every parameter that the config asks for must be stored, in its shape.

    Raises:
        OpdlmError: names the first that is not.
    """
    with torch.device("meta"):  # names and shapes, no memory
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # a tied output matrix is not named twice
        if name not in shards.file_of:
            raise OpdlmError(f"model folder {shards.folder}: no tensor {name} in its safetensors files")
        if shards.shape(name) != tuple(parameter.shape):
            raise OpdlmError(
                f"model folder {shards.folder}: {name} is {list(shards.shape(name))}, but config.json makes it "
                f"{list(parameter.shape)}"
            )


def write_config(config: Any, shards: Shards, folder: Path) -> None:
    """config.json as plain transformers reads it, with our block layout among its fields."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    if config.dtype is None:
        config.dtype = shards.load("model.norm.weight").dtype
    config.save_pretrained(folder)
    finish_config(folder / "config.json")


def write_generation_config(source: Path, config: Any, folder: Path) -> None:
    """The source's generation_config.json as it is; where there is none, what its config says."""
    file = source / "generation_config.json"
    if file.is_file():
        shutil.copyfile(file, folder / file.name)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def finish_config(file: Path) -> None:
    """Takes out of config.json what is derived on reading."""
    raw = json.loads(file.read_text())
    raw.pop("is_diffusion_student", None)
    file.write_text(json.dumps(raw, indent=2) + "\n")
