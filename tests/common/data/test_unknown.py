"""Characters that a tokenizer does not know. `pytest tests/common/data/test_unknown.py`"""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opdlm.common.data.unknown import UnknownCharacters
from opdlm.common.model.char_tokenizer import build_char_tokenizer


def counted(tokenizer, *texts: object) -> UnknownCharacters:
    unknown = UnknownCharacters(tokenizer)
    for number, text in enumerate(texts, start=1):
        given = [text] if isinstance(text, str) else text
        ids = [i for part in given for i in tokenizer(part["content"] if isinstance(part, dict) else part)["input_ids"]]
        unknown.note(f"d:{number}", text, ids)
    return unknown


def test_characters_that_become_the_unknown_token() -> None:
    tokenizer = build_char_tokenizer("ab ")
    found = counted(tokenizer, "ab", "a\u00e9b\u00e9", [{"role": "user", "content": "x"}], "ab <|unk|>")
    assert (found.characters, found.texts) == (3, 2)
    assert found.line() == (
        "unknown characters: 3 in 2 texts; the model reads the unknown token `<|unk|>` instead; first in d:2: "
        "'\u00e9' (U+00E9) in 'a\u00e9b\u00e9'"
    )
    assert counted(tokenizer, "ab").line() is None


def test_characters_that_the_tokenizer_drops() -> None:
    """A BPE without an unknown token leaves them out of the ids without a trace."""
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    found = counted(PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="b"), "ab", "a\u00d7\u00d7b\n")
    assert (found.characters, found.texts) == (2, 1)
    assert "the tokenizer drops them; first in d:2: '\u00d7' (U+00D7)" in str(found.line())


def test_a_byte_level_tokenizer_knows_them_all() -> None:
    """Also where its end token is called its unknown one, as in GPT-2's files."""
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", unk_token="<|end|>")
    assert counted(tokenizer, "\u00e9\u00d7 \U0001f600<|end|>").line() is None
