"""Whether teacher and student mean the same token by the same id, string by string."""

from __future__ import annotations

from common.errors import OpdlmError
from common.models import ModelFacts, has_tokenizer, load_tokenizer


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
