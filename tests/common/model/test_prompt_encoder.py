"""Beginning tokens: what a tokenizer puts in front of text, and nothing behind it.

`pytest tests/common/model/test_prompt_encoder.py`
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from opdlm.common.model.prompt_encoder import PromptEncoder
from opdlm.common.model.tokenizer import load_tokenizer
from tests.tiny import save_teacher

BOS, SEP = 17, 18
ONE = 6  # id of the character 1


def with_post_processor(folder: Path, template: str, cls: str | None = None) -> Path:
    """A Llama-like folder whose tokenizer wraps text in `<s>` and `[SEP]` as the template says."""
    save_teacher(folder, family="llama", spare_rows=4)
    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.add_special_tokens(["<s>", "[SEP]"])
    special = [("<s>", BOS), ("[SEP]", SEP)]
    bpe.post_processor = processors.TemplateProcessing(single=template, pair="$A $B", special_tokens=special)
    bpe.save(str(folder / "tokenizer.json"))
    file = folder / "tokenizer_config.json"
    named = {"bos_token": "<s>", "sep_token": "[SEP]"} | ({"tokenizer_class": cls} if cls else {})
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    return folder


@pytest.mark.parametrize("cls", [None, "LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(
    ("template", "beginning"),
    [
        ("$A", []),
        ("<s> $A", [BOS]),
        ("<s> $A [SEP]", [BOS]),
        ("$A [SEP]", []),
        ("<s> [SEP] $A", [BOS, SEP]),
        ("<s> <s> $A [SEP] [SEP]", [BOS, BOS]),
    ],
)
def test_prompts_begin_as_the_tokenizer_begins_text(tmp_path, template, beginning, cls) -> None:
    tokenizer = load_tokenizer(with_post_processor(tmp_path / "m", template, cls))
    encode = PromptEncoder(tokenizer)
    assert encode.beginning == beginning
    assert encode("1+1=") == beginning + tokenizer("1+1=", add_special_tokens=False)["input_ids"]
    behind = template.partition("$A")[2].count("[SEP]")
    assert encode("1+1=") + behind * [SEP] == tokenizer("1+1=")["input_ids"]


def test_a_beginning_that_the_text_has_is_not_put_there_again(tmp_path) -> None:
    once = PromptEncoder(load_tokenizer(with_post_processor(tmp_path / "once", "<s> $A")))
    assert once("<s>1") == [BOS, ONE]
    assert once("1<s>") == [BOS, ONE, BOS], "inside the text it is the user's"
    two = PromptEncoder(load_tokenizer(with_post_processor(tmp_path / "two", "<s> [SEP] $A")))
    assert two("<s>1") == two("<s>[SEP]1") == two("1") == [BOS, SEP, ONE]


def test_an_empty_text_stays_empty(tmp_path) -> None:
    """Beginning tokens alone are no prompt, so that an empty prompt is refused with every tokenizer."""
    assert PromptEncoder(load_tokenizer(with_post_processor(tmp_path / "m", "<s> $A")))("") == []
