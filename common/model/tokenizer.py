"""Loads the tokenizer of a checkpoint, and checks that teacher and student have the same id for each token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opdlm.common.errors import OpdlmError
from opdlm.common.model.config import read_config

if TYPE_CHECKING:
    from opdlm.common.model.facts import ModelFacts


def load_tokenizer(folder: str | Path, own_mask: bool = True) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder.

    Args:
        own_mask: False leaves out which token its files name as the mask token. A mask token is no text in decoding, so
            a wrong one, such as a digit, would be missing in every text.

    Raises:
        OpdlmError: the folder has no tokenizer, it cannot be read without running code from the folder, or it has no
            end-of-sequence token.
    """
    if not has_tokenizer(folder):
        raise OpdlmError(f"model folder {folder} has no tokenizer.json; expected a tokenizer beside the weights")
    # With a config given, transformers neither looks for code in the folder nor asks whether to run it.
    config = read_config(folder) if (Path(folder) / "config.json").is_file() else None
    changes = {} if own_mask else {"mask_token": None}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, **changes)
    except Exception as error:  # for damaged files, the tokenizers library raises Exception itself
        reason = " ".join(str(error).split())
        raise OpdlmError(f"the tokenizer in {folder} cannot be read: {reason or type(error).__name__}") from error
    if tokenizer.eos_token_id is None:
        raise OpdlmError(f"the tokenizer in {folder} has no end-of-sequence token; set eos_token in its config")
    return tokenizer


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a checkpoint folder has a tokenizer beside its weights."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def check_tokenizers(teacher: ModelFacts, student: ModelFacts) -> None:
    """Checks that the tokenizers of teacher and student have the same token string for each id.

    The student's mask token is left out, because conversion adds it. A folder without a tokenizer passes.

    Raises:
        OpdlmError: an id stands for two different strings, or for a string in only one of the tokenizers.
    """
    if not (has_tokenizer(teacher.folder) and has_tokenizer(student.folder)):
        return
    of_teacher, of_student = (
        {i: token for token, i in load_tokenizer(facts.folder).get_vocab().items() if i != student.mask_id}
        for facts in (teacher, student)
    )
    if differing := sorted(i for i in of_teacher | of_student if of_teacher.get(i) != of_student.get(i)):
        first = differing[0]
        raise OpdlmError(
            f"vocabulary mismatch: the tokenizers give {len(differing)} ids another string, first id {first}: "
            f"{_shown(of_teacher.get(first))} for the teacher {teacher.folder}, {_shown(of_student.get(first))} for "
            f"the student {student.folder}; use a student that was trained with the teacher's tokenizer"
        )


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)
