"""Tokenizers of teacher and student are compared. `pytest tests/common/model/test_tokenizer.py`"""

from __future__ import annotations

import shutil

import pytest

from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import check_vocabularies, read_facts
from opdlm.common.model.tokenizer import check_tokenizers, load_tokenizer
from tests.tiny import save_teacher


@pytest.fixture
def teacher(tmp_path):
    return save_teacher(tmp_path / "teacher")


def test_a_converted_model_of_another_size_agrees(teacher, tmp_path) -> None:
    convert_checkpoint(save_teacher(tmp_path / "wide", 1, hidden_size=24), tmp_path / "student", 4, "absolute")
    check_vocabularies(read_facts(teacher), read_facts(tmp_path / "student"))
    check_tokenizers(read_facts(teacher), read_facts(tmp_path / "student"))


def test_other_strings_under_the_same_ids_are_refused(teacher, tmp_path) -> None:
    """The sizes agree, so only the strings differ. Characters are sorted, so another one moves its neighbours."""
    convert_checkpoint(
        save_teacher(tmp_path / "foreign", alphabet="0123456789+-=x"), tmp_path / "student", 4, "absolute"
    )
    facts = read_facts(teacher), read_facts(tmp_path / "student")
    check_vocabularies(*facts)
    with pytest.raises(
        OpdlmError, match=r"the tokenizers give 2 ids another string, first id 15: ';' for the teacher .*'='"
    ):
        check_tokenizers(*facts)


def test_a_token_that_one_side_lacks_is_refused(teacher, tmp_path) -> None:
    shutil.copytree(teacher, tmp_path / "more")
    tokenizer = load_tokenizer(teacher)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "more")
    with pytest.raises(
        OpdlmError, match=r"give 1 ids another string, first id 17: no token for the teacher .* '<more>' for the"
    ):
        check_tokenizers(read_facts(teacher), read_facts(tmp_path / "more"))


def test_folders_without_tokenizer_are_not_compared(teacher, tmp_path) -> None:
    shutil.copytree(teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    check_tokenizers(read_facts(tmp_path / "bare"), read_facts(teacher))
