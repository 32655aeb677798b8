"""Prompts of a run, and the order in which they are used. The order is a function, so the cursor is one number."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.chat import ChatTemplate
from opdlm.common.data.rows import Row, read_rows
from opdlm.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the data."""

    prompt_id: str
    ids: np.ndarray  # [P] int32
    domain: str | None = None
    max_new_tokens: int | None = None
    """The row's own response limit in tokens."""
    response: np.ndarray | None = None  # [R] int32, with its end-of-sequence token; where the data has one


@dataclass(frozen=True, slots=True)
class PromptSet:
    """What the data gave, and what of it was refused."""

    prompts: list[Prompt]
    refused: list[str]
    """One line a refused prompt: its name and why."""


def load_prompts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, longest: int, seed: int, vocab_size: int | None = None
) -> PromptSet:
    """Reads or makes the prompts of an epoch.

    Args:
        longest: most tokens that a prompt may have and still leave room for its response.
        vocab_size: the teacher's; no token id may lie outside. None: not checked.

    Raises:
        ConfigError: no file, a broken line, or nothing left to train on.
    """
    limit = longest if data.max_prompt_tokens is None else min(longest, data.max_prompt_tokens)
    encode = _encoder(data, tokenizer)
    kept: list[Prompt] = []
    refused: list[str] = []
    for row in itertools.islice(read_rows(data, seed), data.prompts):
        ids = encode(row)
        _check_ids(row, ids, "prompt", vocab_size)
        if not 0 < len(ids) <= limit:
            refused.append(f"{row.name}: {len(ids)} tokens; expected 1 to {limit}")
        else:
            prompt_ids = np.array(ids, dtype=np.int32)
            response = _response(row, tokenizer)
            _check_ids(row, response or [], "response", vocab_size)
            response_ids = None if response is None else np.array(response, dtype=np.int32)
            kept.append(Prompt(row.name, prompt_ids, row.domain, row.max_new_tokens, response_ids))
    if not kept:
        reason = f"; first refusal: {refused[0]}" if refused else ""
        raise ConfigError(f"data: no prompt to train on in {data.path or data.task}{reason}")
    return PromptSet(kept, refused)


class PromptOrder:
    """Which prompt the i-th sample of the run uses: each epoch its own permutation."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, epochs: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self.total = len(prompts) * epochs
        """Samples in the run."""
        self.digest = _digest(prompts)
        """Fingerprint of all that the prompts are, in order."""
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, index: int) -> Prompt:
        epoch, place = divmod(index, len(self._prompts))
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
            self._epoch = epoch
        return self._prompts[self._permutation[place]]


def _digest(prompts: Sequence[Prompt]) -> str:
    running = hashlib.sha256()
    for prompt in prompts:
        running.update(repr((prompt.prompt_id, prompt.domain, prompt.max_new_tokens)).encode())
        for ids in (prompt.ids, prompt.response):
            if ids is not None:
                running.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return running.hexdigest()[:16]


def _encoder(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[Row], list[int]]:
    chat = ChatTemplate(tokenizer, data.system_prompt, data.thinking) if data.chat_template else None

    def encode(row: Row) -> list[int]:
        if isinstance(row.prompt, list):
            return row.prompt
        if chat is not None:
            try:
                return chat.ids(row.prompt)
            except (TemplateError, TypeError) as error:  # what a template may make of a row that it does not like
                raise ConfigError(f"data.chat_template: {row.name}: the template refuses it: {error}") from None
        return list(tokenizer(row.prompt, add_special_tokens=False)["input_ids"])

    return encode


def _check_ids(row: Row, ids: Sequence[int], what: str, vocab_size: int | None) -> None:
    if vocab_size is not None and ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        found = min(ids) if min(ids) < 0 else max(ids)
        raise ConfigError(
            f"data.{what}_field: {row.name} has token id {found}; the teacher's are 0 to {vocab_size - 1}"
        )


def _response(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Token ids that end with the end-of-sequence token: a given response is a finished one."""
    if row.response is None:
        return None
    text = row.response
    ids = list(text if isinstance(text, list) else tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids
