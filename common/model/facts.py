"""Reads the facts about a checkpoint without loading weights: vocabulary, context, special tokens, block grid, size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from opdlm.common.errors import OpdlmError
from opdlm.common.grid import GridKind
from opdlm.common.model.config import OUTPUT, read_config
from opdlm.common.model.end_tokens import disagreement, read_end_tokens
from opdlm.common.model.shards import read_shards
from opdlm.common.model.tokenizer import has_tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts about a checkpoint that its config, its tokenizer and the headers of its weight files give."""

    folder: Path
    vocab_size: int
    """Number of rows of the output matrix."""
    context: int
    """Longest sequence in tokens (`max_position_embeddings`)."""
    eos_ids: tuple[int, ...]
    """Ids of the end-of-sequence tokens that tokenizer, config.json or generation_config.json name, rising; at least
    one. A response ends at any of them."""
    mask_id: int | None
    """Id of the mask token. None: an autoregressive model without one."""
    block_size: int | None
    """Block size of a student, in tokens. None where config.json does not give it."""
    block_grid: GridKind | None
    """Block grid of a student. None where config.json does not give it."""
    is_student: bool
    """Whether config.json marks the model as a block-diffusion student."""
    end_tokens_note: str | None = None
    """One line that says which file names which end-of-sequence tokens. None: they agree."""


def read_facts(folder: str | Path) -> ModelFacts:
    """Reads the facts about a checkpoint folder from its config and its tokenizer.

    Raises:
        OpdlmError: the folder cannot be used, or its files name no end-of-sequence token, or an impossible one.
    """
    folder, config = Path(folder), read_config(folder)
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    ends = read_end_tokens(folder, config.vocab_size, tokenizer)
    return ModelFacts(
        folder=folder,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        eos_ids=ends.ids,
        mask_id=_mask_id(config, tokenizer),
        block_size=getattr(config, "block_size", None),
        block_grid=getattr(config, "block_grid", None),
        is_student=config.is_diffusion_student,
        end_tokens_note=disagreement(ends, folder, tokenizer),
    )


def check_vocabularies(teacher: ModelFacts, student: ModelFacts) -> None:
    """Checks that teacher and student have vocabularies of the same size.

    The student may have one row more, if that row is its mask token (conversion adds it). The losses leave that row out
    of the student's softmax, as sampling does.

    Raises:
        OpdlmError: the sizes differ.
    """
    extra = student.vocab_size - teacher.vocab_size
    if extra != 0 and not (extra == 1 and student.mask_id == teacher.vocab_size):
        raise OpdlmError(
            f"vocabulary mismatch: the teacher {teacher.folder} has {teacher.vocab_size} tokens, the student "
            f"{student.folder} {student.vocab_size}; they must agree, or differ by the student's added mask token"
        )


def require_mask(facts: ModelFacts) -> int:
    """Returns the student's mask token id.

    Raises:
        OpdlmError: it has no mask token.
    """
    if facts.mask_id is None:
        raise OpdlmError(f"{facts.folder} has no mask token; convert it first: opdlm convert {facts.folder} DST")
    return facts.mask_id


def _mask_id(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    if getattr(config, "mask_token_id", None) is not None:
        return int(config.mask_token_id)
    return None if tokenizer is None else tokenizer.mask_token_id


def count_parameters(folder: str | Path) -> int:
    """Returns the number of parameters of a checkpoint folder, from the headers of its weight files."""
    shards = read_shards(folder)
    tied = read_config(folder).tie_word_embeddings  # the output matrix then is the embedding, even if both are stored
    return sum(math.prod(shards.shape(name)) for name in shards.file_of if not (tied and name == OUTPUT))
