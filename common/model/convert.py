"""Converts an autoregressive checkpoint to a student: the same weights, a mask token, and a block size in config.json.

Where the tokenizer has no mask token, `<|MASK|>` is added (`mask_token.py`). If the embedding matrix has more rows than
the tokenizer has tokens (as in Qwen3), the mask token takes one of these rows; otherwise a row is appended. Either way
no logit of an existing token changes. Weight files are copied as bytes, and only a file with a matrix that grows is
written anew, so converting a model of any size needs the memory of one matrix. `opdlm.common.export` writes students
for other programs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from opdlm.common.errors import OpdlmError
from opdlm.common.files import atomic_folder, check_new_folder
from opdlm.common.model.config import EMBEDDING, OUTPUT, read_config
from opdlm.common.model.end_tokens import as_ids, as_setting, write_generation_config
from opdlm.common.model.facts import read_facts
from opdlm.common.model.mask_token import check_mask_row, choose_mask
from opdlm.common.model.shards import Shards, check_finite, copy_shards, read_shards
from opdlm.common.model.tokenizer import load_tokenizer


def convert_checkpoint(
    source: str | Path, destination: str | Path, block_size: int, block_grid: str, mask_token: str | None = None
) -> int:
    """Writes a student checkpoint and returns its mask token id. The destination appears whole or not at all.

    Args:
        source: folder of an autoregressive model, or of a student that gets another block size or grid.
        destination: a folder that does not exist yet.
        block_size: tokens in a block.
        block_grid: `absolute` or `response`.
        mask_token: text of the mask token. None: the one that the tokenizer has, else `<|MASK|>`.

    Raises:
        OpdlmError: the source or the mask token cannot be used, or the destination exists.
    """
    destination = Path(destination)
    check_new_folder("convert", destination)
    config, shards = read_config(source), read_shards(source)
    tokenizer = load_tokenizer(source, own_mask=mask_token is None)
    check_tensors(config, shards)
    mask_id = choose_mask(Path(source), config, tokenizer, read_facts(source).eos_ids, mask_token)
    check_mask_row(mask_id, shards.shape(EMBEDDING)[0])
    check_finite(shards)
    rows = mask_rows(shards, mask_id)
    config.vocab_size += bool(rows)
    config.update({"mask_token_id": mask_id, "block_size": block_size, "block_grid": block_grid})
    # Both files name all end tokens, so that every program ends a response alike.
    config.eos_token_id = as_setting(read_facts(source).eos_ids)
    with atomic_folder(destination) as folder:
        copy_shards(shards, folder, rows, tied_copies(config, shards) if rows else frozenset())
        write_config(config, shards, folder)
        write_generation_config(Path(source), config, folder)
        tokenizer.save_pretrained(folder)
    return mask_id


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase | None, destination: Path) -> None:
    """Saves a model that is in memory, in Hugging Face layout. The destination appears whole or not at all.

    Its config and its generation config get the end-of-sequence tokens of both, and the tokenizer's.
    """
    naming = (model.config, model.generation_config, tokenizer)
    ends = {i for part in naming for i in as_ids(getattr(part, "eos_token_id", None))}
    if ends:
        model.config.eos_token_id = model.generation_config.eos_token_id = as_setting(ends)
    with atomic_folder(destination) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        finish_config(folder / "config.json")


def mask_rows(shards: Shards, mask_id: int) -> dict[str, torch.Tensor]:
    """Returns the row `[D]` for the mask token that each of embedding and output matrix needs: the mean of its rows.

    Returns: tensor name -> row; empty where the matrices have a row for the mask token already.
    """
    if mask_id < shards.shape(EMBEDDING)[0]:
        return {}
    rows = {}
    for name in (EMBEDDING, OUTPUT):
        if name in shards.file_of:
            matrix = shards.load(name)
            rows[name] = matrix.float().mean(0).to(matrix.dtype)
    return rows


def tied_copies(config: Any, shards: Shards) -> frozenset[str]:
    """Names the output matrix of a tied model, where its files hold a second copy of it, as those of Qwen3-0.6B do."""
    return frozenset({OUTPUT} & shards.file_of.keys() if config.tie_word_embeddings else ())


def check_tensors(config: Any, shards: Shards) -> None:
    """Checks that the files hold every parameter that the config asks for, in its shape.

    Raises:
        OpdlmError: a parameter is missing or has another shape; the first one is named.
    """
    with torch.device("meta"):  # gives names and shapes, takes no memory
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # names a tied matrix once
        if name not in shards.file_of:
            raise OpdlmError(f"model folder {shards.folder}: no tensor {name} in its safetensors files")
        if shards.shape(name) != tuple(parameter.shape):
            raise OpdlmError(
                f"model folder {shards.folder}: {name} is {list(shards.shape(name))}, but config.json makes it "
                f"{list(parameter.shape)}"
            )


def write_config(config: Any, shards: Shards, folder: Path) -> None:
    """Writes config.json in the form of plain transformers, with block size and grid among its fields."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    if config.dtype is None:
        config.dtype = shards.load("model.norm.weight").dtype
    config.save_pretrained(folder)
    finish_config(folder / "config.json")


def finish_config(file: Path) -> None:
    """Removes from config.json what `read_config` adds."""
    raw = json.loads(file.read_text())
    raw.pop("is_diffusion_student", None)
    file.write_text(json.dumps(raw, indent=2) + "\n")
