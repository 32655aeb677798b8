"""Exports a student in one of the layouts that other programs load.

`a2d-*` is the layout of the public OPDLM and A2D checkpoints (`AutoModelForMaskedLM`, with code beside the weights).
`sdar` is the one that SGLang and LMDeploy serve. The names of the model families (`qwen3`, `llama`, ...) are the plain
network, for programs that make the attention mask themselves. The weight files are the same bytes in all layouts;
`common/export/templates` holds the code that is copied into the first two. A lossless student is exported to `a2d-*`,
as its base model's weights, its adapters, and code whose `generate` is the verified decoder.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from opdlm.common.errors import OpdlmError
from opdlm.common.export.card import Card, write_card
from opdlm.common.export.names import LAYOUTS, LayoutName
from opdlm.common.files import atomic_folder, check_new_folder
from opdlm.common.form import PAPER_FORM
from opdlm.common.model.adapters import copy_noisy_adapters
from opdlm.common.model.config import read_config
from opdlm.common.model.convert import check_tensors, know_dtype, tied_copies
from opdlm.common.model.facts import DECODING_ORDER, read_facts, require_mask
from opdlm.common.model.families import A2D_PREFIX
from opdlm.common.model.folder import write_all_but_weights
from opdlm.common.model.shards import check_finite, copy_shards, read_shards
from opdlm.common.model.tokenizer import load_tokenizer

ENGINE_MASK_ID, ENGINE_BLOCK_SIZE = 151669, 4
"""The values that SGLang (`dllm/config.py`) and LMDeploy (`configurations/sdar.py`) use for every `SDARForCausalLM`.
They do not read the mask token id from the config; the block size can be set when they are started."""

PLAIN_WARNING = (
    "a plain layout has the names of an autoregressive model: other programs load it as one, and their generate() then "
    "writes nonsense; it is for programs that make block-causal masks of their own"
)


def export(source: str | Path, destination: str | Path, layout: LayoutName, base_model: str | None = None) -> list[str]:
    """Writes a student and its model card in a public layout. The destination appears whole or not at all.

    Args:
        source: folder of a student.
        destination: a folder that does not exist yet.
        base_model: hub id of the autoregressive model, for the card. None: the name of the run's teacher.

    Returns: warnings for the user, one line each.

    Raises:
        OpdlmError: the source cannot be used or is no student, the layout is for another model family, or the
            destination exists.
    """
    source, destination, target = Path(source), Path(destination), LAYOUTS[layout]
    check_new_folder("export", destination)
    config, facts = read_config(source), read_facts(source)
    if config.model_type != target.family:
        fitting = ", ".join(name for name, other in LAYOUTS.items() if other.family == config.model_type)
        raise OpdlmError(f"--layout: found {layout}, but {source} is a {config.model_type}; it can be: {fitting}")
    mask_id = require_mask(facts)
    if facts.block_size is None:
        raise OpdlmError(
            f"{source}/config.json names no block_size; write one: opdlm convert {source} DST --block-size N"
        )
    if facts.form != PAPER_FORM and not layout.startswith(A2D_PREFIX):
        raise OpdlmError(
            f"--layout: found {layout}, whose readers take every student for the paper's; found {facts.form}; use "
            f"a2d-{config.model_type}"
        )
    config.update(
        {"mask_token_id": mask_id, "block_size": facts.block_size, "block_grid": facts.block_grid or "absolute"}
        | {DECODING_ORDER: facts.order}
        | asdict(facts.form)
    )
    tokenizer, shards = load_tokenizer(source), read_shards(source)
    check_tensors(config, shards)
    check_finite(shards)
    know_dtype(config, shards)
    card = Card(source, layout, config, tokenizer, target.auto_map, base_model)
    with atomic_folder(destination) as folder:
        copy_shards(shards, folder, {}, tied_copies(config, shards))
        if facts.has_noisy_adapters:
            copy_noisy_adapters(source, folder)
        write_all_but_weights(folder, config, tokenizer, facts.eos_ids, layout)
        warnings = engine_warnings(config) if layout == "sdar" else [] if target.files else [PLAIN_WARNING]
        write_card(card, warnings, folder / "README.md")
    return [facts.end_tokens_note, *warnings] if facts.end_tokens_note else warnings


def engine_warnings(config: Any) -> list[str]:
    """Says where a student differs from what SGLang and LMDeploy assume, and what to do about it, one line each."""
    warnings = []
    if config.mask_token_id != ENGINE_MASK_ID:
        warnings.append(
            f"the mask token id is {config.mask_token_id}, but SGLang and LMDeploy use {ENGINE_MASK_ID} for every "
            "SDAR model and cannot serve this one; load it with transformers"
        )
    if config.block_grid != "absolute":
        warnings.append(
            f"the block grid is {config.block_grid!r}, but SGLang and LMDeploy count blocks from the first prompt "
            "token (the absolute grid); there the model decodes states that it was not trained on"
        )
    if config.block_size != ENGINE_BLOCK_SIZE:
        warnings.append(
            f"the block size is {config.block_size}, not {ENGINE_BLOCK_SIZE}; set it in SGLang (block_size in the file "
            "of --dllm-algorithm-config) and in LMDeploy (dllm_block_length)"
        )
    return warnings
