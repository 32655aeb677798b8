"""Converts an autoregressive checkpoint to a student: the same weights, a mask token, and a block size in config.json.

Where the tokenizer has no mask token, `<|MASK|>` is added (`mask_token.py`). If the embedding matrix has more rows than
the tokenizer has tokens (as in Qwen3), the mask token takes one of these rows; otherwise a row is appended. Either way
no logit of an existing token changes. Weight files are copied as bytes, and only a file with a matrix that grows is
written anew, so converting a model of any size needs the memory of one matrix. `opdlm.common.export` writes students
for other programs.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from opdlm.common.config.base import DecodingOrder
from opdlm.common.errors import OpdlmError
from opdlm.common.files import atomic_folder, check_new_folder
from opdlm.common.form import Context
from opdlm.common.model.adapters import copy_noisy_adapters
from opdlm.common.model.config import EMBEDDING, OUTPUT, read_config
from opdlm.common.model.facts import DECODING_ORDER, read_facts
from opdlm.common.model.folder import own_layout, write_all_but_weights
from opdlm.common.model.mask_token import check_mask_row, choose_mask
from opdlm.common.model.shards import Shards, check_finite, copy_shards, read_shards
from opdlm.common.model.tokenizer import load_tokenizer


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    block_size: int,
    block_grid: str,
    mask_token: str | None = None,
    logit_shift: bool | None = None,
    context: Context | None = None,
    order: DecodingOrder | None = None,
) -> int:
    """Writes a student checkpoint and returns its mask token id. The destination appears whole or not at all.

    Args:
        source: folder of an autoregressive model, or of a student that gets another block size or grid.
        destination: a folder that does not exist yet.
        block_size: tokens in a block.
        block_grid: `absolute` or `response`.
        mask_token: text of the mask token. None: the one that the tokenizer has, else `<|MASK|>`.
        logit_shift, context: the student's form (`common/form.py`). None: the source's if it is a student, else the
            paper's.
        order: by which position its steps reveal first. None: the source's if it is a student, else by confidence.

    Raises:
        OpdlmError: the source or the mask token cannot be used, the context has another grid, or the destination
            exists.
    """
    destination = Path(destination)
    check_new_folder("convert", destination)
    config, shards = read_config(source), read_shards(source)
    tokenizer = load_tokenizer(source, own_mask=mask_token is None)
    check_tensors(config, shards)
    know_dtype(config, shards)
    facts = read_facts(source)
    form, eos_ids = facts.form.replaced(logit_shift, context), facts.eos_ids
    if facts.has_noisy_adapters and form != facts.form:
        raise OpdlmError(
            f"convert: {source} is a lossless student, whose adapters draft for {facts.form}; found {form}; leave "
            "--logit-shift and --context out"
        )
    if form.causal and block_grid != "response":
        raise OpdlmError(f"causal context needs the block grid `response` (--block-grid); found `{block_grid}`")
    mask_id = choose_mask(Path(source), config, tokenizer, eos_ids, mask_token)
    check_mask_row(mask_id, shards.shape(EMBEDDING)[0])
    check_finite(shards)
    rows = mask_rows(shards, mask_id)
    config.vocab_size += bool(rows)
    decoding = {"block_size": block_size, "block_grid": block_grid, DECODING_ORDER: order or facts.order}
    config.update({"mask_token_id": mask_id, **decoding, **asdict(form)})
    with atomic_folder(destination) as folder:
        copy_shards(shards, folder, rows, tied_copies(config, shards) if rows else frozenset())
        write_all_but_weights(folder, config, tokenizer, eos_ids, own_layout(config))
        if facts.has_noisy_adapters:
            copy_noisy_adapters(Path(source), folder)
    return mask_id


def write_teacher(source: str | Path, destination: str | Path) -> None:
    """Writes an autoregressive model as an ordinary folder, whose weight files are copied as bytes.

    Args:
        source: folder of an autoregressive model.
        destination: a folder that does not exist yet; it appears whole or not at all.

    Raises:
        OpdlmError: the source is a student or cannot be used, or the destination exists.
    """
    destination = Path(destination)
    check_new_folder("convert", destination)
    config, shards, facts = read_config(source), read_shards(source), read_facts(source)
    if facts.is_student:
        raise OpdlmError(
            f"--teacher: {source} is a student, with weights of its own; there is no autoregressive model in it"
        )
    tokenizer = load_tokenizer(source)
    check_tensors(config, shards)
    know_dtype(config, shards)
    check_finite(shards)
    with atomic_folder(destination) as folder:
        copy_shards(shards, folder, {}, frozenset())
        write_all_but_weights(folder, config, tokenizer, facts.eos_ids, own_layout(config))


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


def know_dtype(config: Any, shards: Shards) -> None:
    """Sets the config's `dtype` to that of the weights where config.json does not say it."""
    if config.dtype is None:
        config.dtype = shards.load("model.norm.weight").dtype
