"""Writes model folders, in the form that transformers 4 and 5 read alike: same token ids, same chat text, same logits.

Everything that writes a model goes through here: conversion, exports, the finished student, `opdlm pretrain`. What
transformers 5 writes by itself, version 4 refuses (the tokenizer's class) or misreads without a word (rope). A student
gets the block-causal code beside its weights and a `model_type` that transformers does not know, so nothing loads it
as a causal model by mistake.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from opdlm.common.config.base import DecodingOrder
from opdlm.common.export.names import LAYOUTS, TEMPLATES, LayoutName
from opdlm.common.files import atomic_folder, read_json
from opdlm.common.grid import BlockGrid
from opdlm.common.model.adapters import has_noisy_adapters, write_noisy_adapters
from opdlm.common.model.end_tokens import as_setting
from opdlm.common.model.facts import DECODING_ORDER, read_facts, tokens_of
from opdlm.common.model.families import A2D_PREFIX
from opdlm.common.model.tokenizer import load_tokenizer

_TOKENIZER_KEYS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "split_special_tokens",
    "chat_template",
    "chat_control_tokens",
    "response_template",
)
"""Keys of tokenizer_config.json that are kept as transformers writes them."""
SPARE_TOKEN_IDS = "spare_token_ids"
"""Key of a student's config.json: ranges (first id, one past the last id) of rows of its matrices that no token has."""
_FORCED_CLEAN_UP = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def own_layout(config: Any) -> LayoutName:
    """The layout of a folder that opdlm writes for itself: `a2d-*` for a student, else the plain model family."""
    student = getattr(config, "mask_token_id", None) is not None
    return cast(LayoutName, f"{A2D_PREFIX if student else ''}{config.model_type}")


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, destination: Path, eos_ids: Sequence[int]) -> None:
    """Saves a model that is in memory, in its `own_layout`. The destination appears whole or not at all.

    Args:
        eos_ids: ids of the end-of-sequence tokens.
    """
    # transformers refuses to save some settings that it has loaded; `write_all_but_weights` writes what is kept.
    model.generation_config = GenerationConfig()
    with atomic_folder(destination) as folder:
        model.save_pretrained(folder)
        write_all_but_weights(folder, model.config, tokenizer, eos_ids, own_layout(model.config))


def save_student(
    model: Any,
    start: str | Path,
    destination: Path,
    grid: BlockGrid,
    order: DecodingOrder = "confidence",
) -> None:
    """Saves a trained student with the tokenizer of its start weights' folder, and how it decodes.

    Args:
        start: folder of the start weights. A given student's config.json may not name the mask token, nor blocks and
            grid, and the code beside the weights decodes by them.
        order: by which position its steps reveal first.
    """
    if has_noisy_adapters(model):  # the base model's files stay as they are
        with atomic_folder(destination) as folder:
            shutil.copytree(start, folder, dirs_exist_ok=True)
            write_noisy_adapters(model, folder)
        return
    facts = read_facts(start)
    decoding = {"block_size": grid.block_size, "block_grid": grid.kind, DECODING_ORDER: order, **asdict(facts.form)}
    model.config.update({"mask_token_id": facts.mask_id, **decoding})
    save_model(model, load_tokenizer(start), destination, facts.eos_ids)


def write_all_but_weights(
    folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], layout: LayoutName
) -> None:
    """Writes config.json, generation_config.json, the tokenizer and the layout's code into an existing folder.

    Args:
        config: a config that `read_config` returned, or transformers' own, with a `dtype`.
        eos_ids: ids of the end-of-sequence tokens.
    """
    # Both files name all end tokens, so that every program ends a response alike.
    config.eos_token_id = as_setting(eos_ids)
    config.save_pretrained(folder)
    spare = tokens_of(tokenizer, config.vocab_size).other_ranges(config.vocab_size)
    _rewrite_config(folder / "config.json", config, layout, spare)
    pad = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    # Nothing else of a source's file: its sampling settings are those of an autoregressive model, and some values
    # (`num_return_sequences: 4`) would keep transformers from loading the folder.
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=pad
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _rewrite_tokenizer_config(folder / "tokenizer_config.json", tokenizer)
    for name in LAYOUTS[layout].files:
        shutil.copyfile(TEMPLATES / name, folder / name)


def _rewrite_config(file: Path, config: Any, layout: LayoutName, spare: list[tuple[int, int]]) -> None:
    """Gives config.json the layout's names, and the form of transformers 4, which version 5 and engines read too.

    Args:
        spare: rows of the vocabulary that no token has, for code that decodes without a tokenizer.
    """
    raw, target = read_json(file), LAYOUTS[layout]
    raw.pop("is_diffusion_student", None)  # `read_config` adds it
    raw.pop(SPARE_TOKEN_IDS, None)
    rope = dict(raw.pop("rope_parameters"))
    raw |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw.pop("dtype")}
    if "partial_rotary_factor" in rope:  # Phi3 rotates a part of each head
        raw["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        raw["rope_scaling"] = rope
    raw["architectures"] = [target.architecture or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    if spare and raw.get("mask_token_id") is not None:
        raw[SPARE_TOKEN_IDS] = spare
    if target.architecture:
        raw |= {"model_type": layout, "auto_map": target.auto_map}
    _write(file, raw)


def _rewrite_tokenizer_config(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes tokenizer_config.json so that transformers 4 and 5 take tokenizer.json as it is.

    tokenizer.json holds everything about a tokenizer of the `tokenizers` library. A class of its own (`Qwen2Tokenizer`)
    would rebuild parts of it by its own rules, which differ between the versions; `PreTrainedTokenizerFast` has none.
    """
    raw = read_json(file)
    named = [name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if getattr(tokenizer, name, None) is not None]
    of_model = [name for name in named if name not in type(tokenizer).SPECIAL_TOKENS_ATTRIBUTES]
    # Version 5 has both as `extra_special_tokens`; version 4 reads the list under its older name only.
    special: dict[str, Any] = {name: str(getattr(tokenizer, name)) for name in named if name not in of_model}
    special["additional_special_tokens"] = [str(token) for token in tokenizer.extra_special_tokens]
    if of_model:
        special["extra_special_tokens"] = {name: str(getattr(tokenizer, name)) for name in of_model}
    if not tokenizer.is_fast:  # written in Python, so the class has to stay
        kept = {key: value for key, value in raw.items() if key != "extra_special_tokens" and key not in of_model}
        return _write(file, kept | special)
    backend = tokenizer.backend_tokenizer
    clean_up = bool(tokenizer.clean_up_tokenization_spaces)
    if clean_up and type(backend.model).__name__ == "BPE":  # version 5 then cleans up only where it is forced to
        clean_up = bool(getattr(tokenizer, _FORCED_CLEAN_UP, False))
        special |= {_FORCED_CLEAN_UP: True} if clean_up else {}
    before_words = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer is not None else {}
    if "add_prefix_space" in before_words:  # version 4 sets tokenizer.json's own to this value
        special["add_prefix_space"] = before_words["add_prefix_space"]
    _write(
        file,
        {key: raw[key] for key in _TOKENIZER_KEYS if key in raw}
        | special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": clean_up,
            "model_input_names": ["input_ids", "attention_mask"],  # version 4 would add token_type_ids
        },
    )


def _write(file: Path, raw: dict[str, Any]) -> None:
    file.write_text(json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
