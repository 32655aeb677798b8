"""Turns the text of prompts into token ids, with the beginning tokens that the tokenizer itself puts in front of text.

Everything that encodes a text prompt uses `PromptEncoder`: training data, `generate`, `eval`, lm-eval, traces. Two
kinds of text go without it. A chat template writes its own beginning (`common/data/chat.py`), and a response begins
where its prompt ends.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase


class PromptEncoder:
    """Encodes prompts as the tokenizer encodes a text (`tokenizer(text)`), but without what it puts behind the text.

    An end-of-sequence or separator token behind a prompt would end it before its response begins.

    Attributes:
        beginning: ids of the tokens in front of each text, such as Llama's `<|begin_of_text|>`; mostly empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.beginning = _beginning(tokenizer)

    def __call__(self, text: str) -> list[int]:
        """Token ids of a prompt. Beginning tokens that the text itself starts with are not put there again.

        Returns: none for a text without tokens, because beginning tokens alone are no prompt.
        """
        ids = _plain(self._tokenizer, text)
        if not ids:
            return []
        longest = min(len(self.beginning), len(ids))
        written = next(n for n in range(longest, -1, -1) if ids[:n] == self.beginning[:n])
        return self.beginning + ids[written:]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    for probe in _probes(tokenizer):
        plain = _plain(tokenizer, probe)
        if plain:
            whole = list(tokenizer(probe)["input_ids"])
            starts = range(len(whole) - len(plain) + 1)
            return next((whole[:start] for start in starts if whole[start : start + len(plain)] == plain), [])
    return []


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts of which one has a token in every vocabulary; what is put around a text does not depend on the text."""
    yield from ("a", "1")
    yield from (token for token in tokenizer.get_vocab() if token not in tokenizer.all_special_tokens)


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
