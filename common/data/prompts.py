"""The prompts of a run and the order in which the run uses them.

The order is a function of seed and sample number, so a checkpoint stores one number to say how far the run came.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from opdlm.common.config.data import DataConfig, source_data, source_names
from opdlm.common.data.chat import EMPTY, ChatRefused, ChatTemplate
from opdlm.common.data.conversation import blank_message
from opdlm.common.data.mixture import SourceShare, epoch_prompts
from opdlm.common.data.reranking import Reference, RerankCase
from opdlm.common.data.rows import Row, read_rows
from opdlm.common.data.unknown import UnknownCharacters
from opdlm.common.errors import ConfigError
from opdlm.common.model.prompt_encoder import PromptEncoder
from opdlm.common.token_ids import TokenIds

_LARGEST_ID = 2**31 - 1
"""Token ids are int32."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the data, as token ids."""

    prompt_id: str
    """Name of its row: `file:number`, or `task/number`."""
    ids: np.ndarray  # [P] int32
    domain: str | None = None
    max_new_tokens: int | None = None
    """The row's own limit of its response, in tokens."""
    response: np.ndarray | None = None  # [R] int32
    """The given response with its end-of-sequence token; None where the data has no response."""
    source: str | None = None
    """Name of its source in `data.sources`."""
    reference: Reference | None = None
    """What a reward compares responses with."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of an epoch, and the rows of the data that were refused."""

    prompts: list[Prompt]
    refused: list[str]
    """One line per refused row: its name and the reason."""
    unknown_characters: int = 0
    """Characters of prompts and responses that the tokenizer does not know."""
    unknown: str | None = None
    """One line about them, with the first; None where there are none."""
    shares: tuple[SourceShare, ...] = ()
    """The sources of `data.sources`, in their order; none where there is one source without a weight."""

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples that an epoch makes of the prompts."""
        return sum(share.samples_per_epoch for share in self.shares) if self.shares else len(self.prompts)


def load_prompts(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    seed: int,
    tokens: TokenIds | None = None,
    eos_ids: Sequence[int] = (),
) -> PromptSet:
    """Reads the prompts of an epoch from the data, or has the task make them.

    A prompt that is empty or has an empty user message, or is longer than `longest` or `data.max_prompt_tokens`, is
    refused, never cut.

    Args:
        longest: the longest prompt, in tokens, that leaves room for its response in the model's context.
        seed: seed of a task's problems.
        tokens: the teacher's tokens, which every token id must be one of. None: they are not known.
        eos_ids: tokens that end a response, beside the tokenizer's own.

    Raises:
        ConfigError: the data cannot be read, a row is broken, a token id is out of range, or no prompt is left.
    """
    if data.sources:
        return _load_sources(data, tokenizer, longest, seed, tokens, eos_ids)
    limit = longest if data.max_prompt_tokens is None else min(longest, data.max_prompt_tokens)
    encode = _encoder(data, tokenizer)
    kept: list[Prompt] = []
    refused: list[str] = []
    unknown = UnknownCharacters(tokenizer)
    for row in itertools.islice(read_rows(data, seed), data.prompts):
        if reason := _blank(row, data):
            refused.append(f"{row.name}: {reason}")
            continue
        ids = encode(row)
        _check_ids(row, ids, "prompt", tokens)
        if not 0 < len(ids) <= limit:
            refused.append(f"{row.name}: {len(ids)} tokens; expected 1 to {limit}")
        else:
            prompt_ids = np.array(ids, dtype=np.int32)
            response = _response(row, tokenizer, eos_ids)
            _check_ids(row, response or [], "response", tokens)
            response_ids = None if response is None else np.array(response, dtype=np.int32)
            limits = row.domain, row.max_new_tokens
            kept.append(Prompt(row.name, prompt_ids, *limits, response_ids, reference=row.reference))
            unknown.note(row.name, row.prompt, ids)
            if response is not None:
                unknown.note(row.name, row.response or "", response)
    if not kept:
        reason = f"; first refusal: {refused[0]}" if refused else ""
        raise ConfigError(f"data: found no prompt to train on in {data.path or data.task}{reason}")
    return PromptSet(kept, refused, unknown.characters, unknown.line())


def _load_sources(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    seed: int,
    tokens: TokenIds | None,
    eos_ids: Sequence[int],
) -> PromptSet:
    """The prompts of all sources, one source after the other; each prompt's id begins with its source's name."""
    whole = PromptSet([], [])
    for place, name in enumerate(source_names(data)):
        source, where = data.sources[place], f"data.sources[{place}]"
        try:
            found = load_prompts(source_data(data, place), tokenizer, longest, seed, tokens, eos_ids)
        except ConfigError as error:
            raise ConfigError(_in_source(str(error), where, source.model_fields_set)) from error
        share = SourceShare(name, source.weight, len(whole.prompts), len(found.prompts), len(found.refused))
        if share.samples_per_epoch == 0:
            raise ConfigError(
                f"{where}.weight: found {source.weight:g}, which takes none of the source's {share.kept} prompts; give "
                f"at least {1 / share.kept:.2g}"
            )
        whole = PromptSet(
            [
                *whole.prompts,
                *(
                    replace(p, prompt_id=f"{name}/{p.prompt_id}", domain=p.domain or source.domain, source=name)
                    for p in found.prompts
                ),
            ],
            [*whole.refused, *(f"{name}/{line}" for line in found.refused)],
            whole.unknown_characters + found.unknown_characters,
            whole.unknown or found.unknown,
            (*whole.shares, share),
        )
    return whole


def _in_source(text: str, where: str, given: Set[str]) -> str:
    """An error about `data.X` as one about the source, where the source says X itself."""
    setting = re.match(r"data(?:\.(\w+))?:", text)
    if setting is None:
        return f"{where}: {text}"
    if setting[1] is None:
        return where + text.removeprefix("data")
    if setting[1] in given:
        return f"{where}.{text.removeprefix('data.')}"
    return f"{text} ({where})"


class PromptOrder:
    """Says which prompt each sample of the run uses: `order[i]` is the prompt of sample i.

    Each epoch uses every prompt once, in a permutation of its own. With `shares` it uses the prompts of each source as
    often as its weight says. The samples of one prompt, where it has several responses, are side by side.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        epochs: int,
        shares: Sequence[SourceShare] = (),
        responses_per_prompt: int = 1,
    ) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shares = shares
        self._per_epoch = sum(share.samples_per_epoch for share in shares) if shares else len(prompts)
        self.responses_per_prompt = responses_per_prompt
        self.total = self._per_epoch * epochs * responses_per_prompt
        """Number of samples in the run."""
        self.digest = _digest(prompts, shares)
        """Fingerprint of the prompts in their order: names, domains, limits, token ids, responses and weights."""
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def used(self, samples: int) -> list[Prompt]:
        """The prompts of the run's first `samples` samples, each once, in the order of their first use."""
        found: dict[str, Prompt] = {}
        for index in range(samples):
            if len(found) == len(self._prompts):
                break
            prompt = self[index]
            found.setdefault(prompt.prompt_id, prompt)
        return list(found.values())

    def samples_by_source(self, indices: range) -> dict[str, int]:
        """How many of these samples come from each source; empty where there are no sources."""
        counts = Counter(self[index].source for index in indices) if self._shares else Counter()
        return {share.name: counts[share.name] for share in self._shares}

    def __getitem__(self, index: int) -> Prompt:
        epoch, place = divmod(index // self.responses_per_prompt, self._per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._per_epoch)
            chosen = epoch_prompts(self._shares, self._seed, epoch) if self._shares else None
            self._permutation = order if chosen is None else chosen[order]
            self._epoch = epoch
        return self._prompts[self._permutation[place]]


def _digest(prompts: Sequence[Prompt], shares: Sequence[SourceShare]) -> str:
    running = hashlib.sha256()
    for share in shares:
        running.update(repr((share.name, share.weight)).encode())
    for prompt in prompts:
        known: tuple[object, ...] = (prompt.prompt_id, prompt.domain, prompt.max_new_tokens)
        if isinstance(prompt.reference, RerankCase):  # a text is the response, which counts below
            known += (prompt.reference.candidates, prompt.reference.target)
        running.update(repr(known).encode())
        for ids in (prompt.ids, prompt.response):
            if ids is not None:
                running.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return running.hexdigest()[:16]


def _encoder(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[Row], list[int]]:
    chat = ChatTemplate(tokenizer, data.system_prompt, data.thinking) if data.chat_template else None
    encode_text = PromptEncoder(tokenizer)

    def encode(row: Row) -> list[int]:
        if isinstance(row.prompt, list):
            return row.prompt
        if chat is not None:
            try:
                return chat.ids(row.prompt)
            except ChatRefused as error:
                raise ConfigError(f"data.chat_template: {row.name}: {error}") from None
        assert isinstance(row.prompt, str), "messages without a chat template are refused when they are read"
        return encode_text(row.prompt)

    return encode


def _blank(row: Row, data: DataConfig) -> str | None:
    """Why a row asks nothing: without a chat template white space is text as any other. None: it asks something."""
    if isinstance(row.prompt, str):
        return EMPTY if data.chat_template and not row.prompt.strip() else None
    if not isinstance(row.prompt, list) and (number := blank_message(row.prompt)) is not None:
        return f"message {number} (user) is empty"
    return None


def _check_ids(row: Row, ids: Sequence[int], column: str, tokens: TokenIds | None) -> None:
    known = TokenIds(_LARGEST_ID + 1) if tokens is None else tokens
    if (unknown := next((i for i in ids if i not in known), None)) is not None:
        whose = "possible ids" if tokens is None else "the teacher's"
        without = f", without {len(known.holes)} in between" if known.holes else ""
        raise ConfigError(
            f"data.{column}_field: {row.name} has token id {unknown}; {whose} are 0 to {known.end - 1}{without}"
        )


def _response(row: Row, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> list[int] | None:
    """Token ids of the row's response. A given response is finished, so it gets an end-of-sequence token if it has none
    at its end."""
    given = row.response
    if given is None:
        return None
    ids = list(given if isinstance(given, list) else tokenizer(given, add_special_tokens=False)["input_ids"])
    if not ids or ids[-1] not in (tokenizer.eos_token_id, *eos_ids):
        ids.append(tokenizer.eos_token_id)
    return ids
