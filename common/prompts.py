"""Prompts of a run, and the order in which they are used. The order is a function, so the cursor is one number."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.config.schema import DataConfig
from common.errors import ConfigError
from common.tasks import get_task, problems


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the data."""

    prompt_id: str
    ids: np.ndarray  # [P] int32
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class PromptSet:
    """What the data gave, and what of it was refused."""

    prompts: list[Prompt]
    refused: list[str]
    """One line a refused prompt: its name and why."""


def load_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase, longest: int, seed: int) -> PromptSet:
    """Reads or makes the prompts of an epoch.

    Args:
        longest: most tokens that a prompt may have and still leave room for its response.

    Raises:
        ConfigError: no file, a broken line, or nothing left to train on.
    """
    limit = longest if data.max_prompt_tokens is None else min(longest, data.max_prompt_tokens)
    kept: list[Prompt] = []
    refused: list[str] = []
    for prompt_id, content, domain in itertools.islice(_rows(data, seed), data.prompts):
        ids = content if isinstance(content, list) else tokenizer(content, add_special_tokens=False)["input_ids"]
        if not 0 < len(ids) <= limit:
            refused.append(f"{prompt_id}: {len(ids)} tokens; expected 1 to {limit}")
        else:
            kept.append(Prompt(prompt_id, np.array(ids, dtype=np.int32), domain))
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
        """Fingerprint of the prompts' ids, in order."""
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
        running.update(len(prompt.ids).to_bytes(4, "little") + prompt.ids.tobytes())
    return running.hexdigest()[:16]


def _rows(data: DataConfig, seed: int) -> Iterator[tuple[str, str | list[int], str | None]]:
    if data.task is not None:
        for number, problem in enumerate(problems(get_task(data.task), "train", seed)):
            yield f"{data.task}/{number}", problem.prompt, None
    else:
        yield from _jsonl_rows(Path(str(data.path)), data.prompt_field, data.domain_field)


def _jsonl_rows(file: Path, field: str, domain_field: str) -> Iterator[tuple[str, str | list[int], str | None]]:
    if not file.is_file():
        raise ConfigError(f"data.path: {file} does not exist; expected a JSONL file of prompts")
    with file.open() as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file.name}:{number}"
            try:
                row: Any = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"data.path: {where} is not JSON: {error}") from None
            if not isinstance(row, dict) or field not in row:
                found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise ConfigError(f"data.prompt_field: {where} has no `{field}`; found: {found}")
            content = row[field]
            is_ids = isinstance(content, list) and all(isinstance(i, int) for i in content)
            if not (isinstance(content, str) or is_ids):
                raise ConfigError(f"data.prompt_field: {where}: `{field}` is neither text nor a list of token ids")
            yield where, content, row.get(domain_field)
