"""Counts the characters that a tokenizer does not know: those that become its unknown token, or that it drops."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_SHOWN = 40
"""Characters of the first text that are quoted."""


class UnknownCharacters:
    """Counts unknown characters over texts. A byte-level tokenizer has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Byte-level tokenizers know every character; some name the end token as their unknown one.
        ends = (tokenizer.eos_token_id, tokenizer.bos_token_id)
        self._unknown = None if tokenizer.unk_token_id in ends else tokenizer.unk_token_id
        self._dropped: dict[str, bool] = {}
        """For every character seen so far, whether it has no token at all."""
        self.characters = 0
        """Unknown characters in all texts."""
        self.texts = 0
        """Texts with at least one."""
        self._first = ""

    def note(self, name: str, text: str | Sequence[int] | Sequence[Mapping[str, Any]], ids: Sequence[int]) -> None:
        """Counts those of one text.

        Args:
            name: what to call it, such as `prompts.jsonl:7`.
            text: text, chat messages, or token ids, which have no characters.
            ids: token ids that were made of it.
        """
        texts = [text] if isinstance(text, str) else [item["content"] for item in text if isinstance(item, Mapping)]
        has_unknown = self._unknown is not None and self._unknown in ids
        found = [(one, places) for one in texts if (places := self._places(one, has_unknown))]
        if not found:
            return
        self.texts += 1
        self.characters += sum(len(places) for _, places in found)
        if not self._first:
            one, places = found[0]
            character = one[places[0]]
            around = one[max(places[0] - _SHOWN // 2, 0) :][:_SHOWN]
            self._first = f"{name}: {character!r} (U+{ord(character):04X}) in {around!r}"

    def line(self) -> str | None:
        """What the user is told; None where every character is known."""
        if not self.characters:
            return None
        reads = f"the model reads the unknown token `{self._tokenizer.unk_token}` instead"
        fate = "the tokenizer drops them" if self._unknown is None else reads
        return f"unknown characters: {self.characters:,} in {self.texts:,} texts; {fate}; first in {self._first}"

    def _places(self, text: str, has_unknown: bool) -> list[int]:
        """Indices of a text's unknown characters, in rising order."""
        for character in set(text) - self._dropped.keys():
            self._dropped[character] = self._is_dropped(character)
        places = {place for place, character in enumerate(text) if self._dropped[character]}
        if has_unknown and self._tokenizer.is_fast:
            made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            for token, (start, end) in zip(made["input_ids"], made["offset_mapping"], strict=True):
                if token == self._unknown and text[start:end] != self._tokenizer.unk_token:
                    places.update(range(start, end))
        elif has_unknown:  # a tokenizer in Python does not say which characters a token stands for
            places.update(place for place, character in enumerate(text) if self._unknown in self._ids(character))
        return sorted(places)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _is_dropped(self, character: str) -> bool:
        """White space, marks and control characters do not count: normalisation may merge or strip them."""
        if unicodedata.category(character)[0] not in "LNPS":
            return False
        return not self._ids(character)
