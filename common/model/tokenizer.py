"""A checkpoint folder's tokenizer, and whether teacher and student mean the same token by the same id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opdlm.common.errors import OpdlmError
from opdlm.common.model.config import read_config

if TYPE_CHECKING:
    from opdlm.common.model.facts import ModelFacts


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        OpdlmError: there is none, it cannot be read without running code, or it lacks an end-of-sequence token.
    """
    if not has_tokenizer(folder):
        raise OpdlmError(f"model folder {folder} has no tokenizer.json; text needs a tokenizer beside the weights")
    # Given our reading of the config, transformers neither looks for code in the folder nor asks whether to run it.
    config = read_config(folder) if (Path(folder) / "config.json").is_file() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # whatever its files can do wrong; the tokenizers library raises Exception itself
        reason = " ".join(str(error).split())
        raise OpdlmError(f"the tokenizer in {folder} cannot be read: {reason or type(error).__name__}") from error
    if tokenizer.eos_token_id is None:
        raise OpdlmError(f"the tokenizer in {folder} has no end-of-sequence token (eos_token); responses could not end")
    return tokenizer


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a checkpoint folder has a tokenizer beside its weights."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def check_tokenizers(teacher: ModelFacts, student: ModelFacts) -> None:
    """Compares the two tokenizers' token strings, id by id, where both folders have one.

    The student's mask token is left out: conversion adds it.

    Raises:
        OpdlmError: an id that stands for different strings, or for a string in only one of them.
    """
    if not (has_tokenizer(teacher.folder) and has_tokenizer(student.folder)):
        return
    ours, theirs = (
        {i: token for token, i in load_tokenizer(facts.folder).get_vocab().items() if i != student.mask_id}
        for facts in (teacher, student)
    )
    if differing := sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i)):
        first = differing[0]
        raise OpdlmError(
            f"vocabulary mismatch: the tokenizers give {len(differing)} ids another string, first id {first}: "
            f"{_shown(ours.get(first))} for the teacher {teacher.folder}, {_shown(theirs.get(first))} for the student "
            f"{student.folder}; use a student that was trained with the teacher's tokenizer"
        )


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)
