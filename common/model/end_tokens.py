"""Which tokens end a response: all those that the tokenizer, config.json and generation_config.json of a folder name.

Fine-tuned models often name the end of a chat turn in one of these files and the end of a text in another. The files
are read as data. Of generation_config.json only `eos_token_id` counts: opdlm decodes by settings of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from opdlm.common.errors import OpdlmError
from opdlm.common.files import read_json

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "the tokenizer"

MODEL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "output_attentions", "output_hidden_states")
"""Keys that a model's config shares with generation_config.json."""
GENERATION_KEYS = frozenset(GenerationConfig().to_dict()) - {*MODEL_KEYS, "transformers_version"}
"""Keys that say how to generate; old checkpoints have some of them in config.json."""


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The end-of-sequence tokens that each file of a model folder names."""

    named: dict[str, tuple[int, ...]]
    """File -> ids, rising; without the files that name none."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all of them, rising."""
        return tuple(sorted({i for ids in self.named.values() for i in ids}))

    @property
    def agree(self) -> bool:
        """Whether the files name the same tokens; a tokenizer can name only one of them."""
        lists = [ids for file, ids in self.named.items() if file != TOKENIZER]
        return all(ids == lists[0] for ids in lists) and (not lists or set(self.ids) == set(lists[0]))


def read_end_tokens(folder: Path, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None) -> EndTokens:
    """Reads the end-of-sequence tokens that a model folder names.

    Args:
        vocab_size: rows of the output matrix, which every id must lie below.
        tokenizer: the folder's; None where it has none.

    Raises:
        OpdlmError: an id has a wrong form or is outside the vocabulary, or no file names a token.
    """
    named = {}
    for name in (CONFIG, GENERATION):
        if (file := folder / name).is_file():
            named[name] = checked_end_tokens(read_json(file).get("eos_token_id"), file, vocab_size)
    if tokenizer is not None:
        own = int(tokenizer.eos_token_id)
        if own >= vocab_size:
            raise OpdlmError(
                f"the tokenizer in {folder}: its eos_token {tokenizer.eos_token!r} has id {own}; the model has the ids "
                f"0 to {vocab_size - 1}; name a token of the model"
            )
        named = {TOKENIZER: (own,), **named}
    found = EndTokens({name: ids for name, ids in named.items() if ids})
    if not found.ids:
        raise OpdlmError(f"{folder}/config.json names no end-of-sequence token; set eos_token_id in it")
    return found


def checked_end_tokens(found: Any, file: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids in a file's `eos_token_id`, rising; none where it is null.

    Raises:
        OpdlmError: it is not an id of the vocabulary or a list of such ids.
    """
    ids = as_ids(found)
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):  # a bool is an int, too
        raise OpdlmError(
            f"{file}: eos_token_id: found {found!r}; expected a token id from 0 to {vocab_size - 1}, or a list of them"
        )
    return tuple(sorted(set(ids)))


def as_ids(found: Any) -> list[Any]:
    """The values in an `eos_token_id`: of a list, one, or none."""
    return [] if found is None else list(found) if isinstance(found, list) else [found]


def as_setting(ids: Iterable[int]) -> int | list[int]:
    """The value of `eos_token_id` in the files that we write: one id, or a list of several."""
    ids = sorted(set(ids))
    return ids[0] if len(ids) == 1 else ids


def token_names(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Token ids with their strings, in words."""
    strings = {i: None if tokenizer is None else tokenizer.convert_ids_to_tokens(i) for i in ids}
    return ", ".join(f"{i}" if text is None else f"{text!r} ({i})" for i, text in strings.items())


def disagreement(found: EndTokens, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Says in one line which file names which tokens; None where they agree."""
    if found.agree:
        return None
    parts = "; ".join(f"{name} {token_names(ids, tokenizer)}" for name, ids in found.named.items())
    return f"end tokens: the files of {folder} name different ones ({parts}); a response ends at any of them"


def check_generation_config(folder: Path, vocab_size: int) -> None:
    """Raises `OpdlmError` where generation_config.json is no JSON object or names an impossible end token."""
    if (file := folder / GENERATION).is_file():
        checked_end_tokens(read_json(file).get("eos_token_id"), file, vocab_size)
