"""Reads the facts about a checkpoint without loading weights: vocabulary, context, special tokens, block grid, size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from opdlm.common.config.base import STRATEGIES_BY_ORDER, DecodingOrder, Strategy
from opdlm.common.errors import OpdlmError
from opdlm.common.form import Context, StudentForm
from opdlm.common.grid import BlockGrid, GridKind
from opdlm.common.model.adapters import NOISY_LORA
from opdlm.common.model.config import OUTPUT, read_config
from opdlm.common.model.end_tokens import disagreement, read_end_tokens
from opdlm.common.model.mask_token import mask_problem
from opdlm.common.model.shards import read_shards
from opdlm.common.model.tokenizer import has_tokenizer, load_tokenizer
from opdlm.common.token_ids import TokenIds

DECODING_ORDER = "decoding_order"
"""Key of a student's config.json: `ModelFacts.order`."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts about a checkpoint that its config, its tokenizer and the headers of its weight files give."""

    folder: Path
    vocab_size: int
    """Number of rows of the output matrix."""
    tokens: TokenIds
    """The rows that are tokens of the folder's tokenizer; all rows where the folder has no tokenizer."""
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
    form: StudentForm
    """Form of a student; the paper's where config.json does not say otherwise."""
    order: DecodingOrder
    """By which position a student's steps reveal first; by confidence, as in the paper, where config.json does not say
    otherwise."""
    is_student: bool
    """Whether config.json marks the model as a block-diffusion student."""
    has_noisy_adapters: bool = False
    """Whether a student has adapters that act on noisy tokens alone, so that its clean path is its base model's."""
    end_tokens_note: str | None = None
    """One line that says which file names which end-of-sequence tokens. None: they agree."""

    @property
    def usual_strategies(self) -> tuple[Strategy, ...]:
        """How a student is decoded unless something else is asked for; the last is for a single answer."""
        return ("verified",) if self.has_noisy_adapters else STRATEGIES_BY_ORDER[self.order]

    def grid(self, block_size: int | None = None) -> BlockGrid:
        """The grid that it is decoded on. `block_size`: None takes the checkpoint's own, else 4."""
        return BlockGrid(block_size or self.block_size or 4, self.block_grid or "absolute")


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
        tokens=tokens_of(tokenizer, config.vocab_size),
        context=config.max_position_embeddings,
        eos_ids=ends.ids,
        mask_id=_mask_id(folder, config, tokenizer),
        block_size=getattr(config, "block_size", None),
        block_grid=getattr(config, "block_grid", None),
        form=_form(config, folder),
        order=_order(config, folder),
        is_student=config.is_diffusion_student,
        has_noisy_adapters=getattr(config, NOISY_LORA, None) is not None,
        end_tokens_note=disagreement(ends, folder, tokenizer),
    )


def check_vocabularies(teacher: ModelFacts, student: ModelFacts) -> None:
    """Checks that the same ids are tokens for teacher and student, whatever rows their matrices have beside them.

    The student may have one token more: its mask token, which conversion adds. Where one of the folders has no
    tokenizer, the matrices must have equally many rows, not counting a row for the mask token.

    Raises:
        OpdlmError: the tokens differ.
    """
    shared = shared_tokens(teacher, student)
    added = () if student.mask_id is None or student.mask_id in teacher.tokens else (student.mask_id,)
    agree = teacher.tokens == shared == student.tokens.without(*added)
    if not (has_tokenizer(teacher.folder) and has_tokenizer(student.folder)):  # nothing says which rows are padding
        agree = student.vocab_size - teacher.vocab_size == len([i for i in added if i == teacher.vocab_size])
    if not agree:
        raise OpdlmError(
            f"vocabulary mismatch: the teacher {teacher.folder} has {len(teacher.tokens)} tokens, the student "
            f"{student.folder} {len(student.tokens)}; they must agree, or differ by the student's added mask token"
        )


def shared_tokens(teacher: ModelFacts, student: ModelFacts) -> TokenIds:
    """The tokens that teacher and student have, which are the outcomes of the losses and the rows of the targets.

    A mask token that conversion added is none of them, whether it took a spare row or a new one: the teacher does not
    know it, and the student never draws it.
    """
    return teacher.tokens & student.tokens


def never_drawn(facts: ModelFacts) -> tuple[int, ...]:
    """Rows of a student's vocabulary that its decoder never draws: the mask, and rows that no token has."""
    return tuple(facts.tokens.without(require_mask(facts)).others(facts.vocab_size))


def require_mask(facts: ModelFacts) -> int:
    """Returns the student's mask token id.

    Raises:
        OpdlmError: it has no mask token, or one that has no row or another role.
    """
    folder, mask_id = facts.folder, facts.mask_id
    if mask_id is None:
        raise OpdlmError(f"{folder} has no mask token; convert it first: opdlm convert {folder} DST")
    if mask_id >= facts.vocab_size:
        raise OpdlmError(
            f"{folder}: the mask token has id {mask_id}, but the matrices have {facts.vocab_size} rows; convert it "
            f"first: opdlm convert {folder} DST"
        )
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    if problem := mask_problem(folder, read_config(folder), tokenizer, mask_id, facts.eos_ids):
        raise OpdlmError(
            f"{folder}: its mask token has id {mask_id}, which is {problem}; a student needs a mask token of its own: "
            "convert the autoregressive model again (opdlm convert --mask-token)"
        )
    return mask_id


def _form(config: Any, folder: Path) -> StudentForm:
    shift: Any = getattr(config, "logit_shift", False)
    context: Any = getattr(config, "context", "block_causal")
    if not isinstance(shift, bool):
        raise OpdlmError(f"{folder}/config.json: logit_shift is {shift!r}; expected true or false")
    if context not in get_args(Context):
        raise OpdlmError(
            f"{folder}/config.json: context is {context!r}; expected one of {', '.join(get_args(Context))}"
        )
    if context == "causal" and getattr(config, "block_grid", None) != "response":
        raise OpdlmError(f"{folder}/config.json: context is 'causal', which needs block_grid 'response'")
    return StudentForm(shift, context)


def _order(config: Any, folder: Path) -> DecodingOrder:
    order: Any = getattr(config, DECODING_ORDER, "confidence")
    if order not in get_args(DecodingOrder):
        expected = ", ".join(get_args(DecodingOrder))
        raise OpdlmError(f"{folder}/config.json: {DECODING_ORDER} is {order!r}; expected one of {expected}")
    return order


def tokens_of(tokenizer: PreTrainedTokenizerBase | None, rows: int) -> TokenIds:
    """The rows of a vocabulary that are tokens of the tokenizer; all rows where there is none."""
    if tokenizer is None:
        return TokenIds(rows)
    return TokenIds.of(i for i in tokenizer.get_vocab().values() if i < rows)


def _mask_id(folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    found = getattr(config, "mask_token_id", None)
    if found is None:
        return None if tokenizer is None else tokenizer.mask_token_id
    if type(found) is not int or not 0 <= found < config.vocab_size:
        raise OpdlmError(
            f"{folder}/config.json: mask_token_id is {found!r}; expected a token id, from 0 to {config.vocab_size - 1}"
        )
    return found


def count_parameters(folder: str | Path) -> int:
    """Returns the number of parameters of a checkpoint folder, from the headers of its weight files."""
    shards = read_shards(folder)
    tied = read_config(folder).tie_word_embeddings  # the output matrix then is the embedding, even if both are stored
    return sum(math.prod(shards.shape(name)) for name in shards.file_of if not (tied and name == OUTPUT))
