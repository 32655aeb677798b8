"""Which token may be the mask token. `pytest tests/common/model/test_mask_token.py`"""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.cli import app
from tests.tiny import save_teacher

TOKENS = 17


def change(file, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def teacher(tmp_path):
    return save_teacher(tmp_path / "teacher")


REFUSED = [
    ("<|endoftext|>", "an end-of-sequence token"),
    ("<|pad|>", "the padding token"),
    ("<|unk|>", "the token for unknown text"),
    ("7", "ordinary text"),
]


@pytest.mark.parametrize(("token", "reason"), REFUSED)
@pytest.mark.parametrize("how", ["named", "asked for"])
def test_a_token_with_another_role_is_refused(teacher, tmp_path, token, reason, how) -> None:
    if how == "named":
        change(teacher / "tokenizer_config.json", mask_token=token)
    asked = ["--mask-token", token] if how == "asked for" else []
    done = CliRunner().invoke(app, ["convert", str(teacher), str(tmp_path / "student"), *asked])
    assert done.exit_code == 2
    assert f"which is {reason}" in done.stderr
    assert "opdlm convert --mask-token" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "student").exists()


def test_text_that_prompts_could_hold_is_refused(teacher, tmp_path) -> None:
    """Also where the files mark it as a special token, or list it beside the vocabulary, or do not know it."""
    tokenizer = load_tokenizer(teacher)
    tokenizer.add_tokens(["hey", "<tool>"])
    tokenizer.add_special_tokens({"mask_token": "8"})
    tokenizer.save_pretrained(teacher)
    for asked in (None, "8", "hey", "<tool>", "new", "", " "):
        with pytest.raises(OpdlmError, match="ordinary text"):
            convert_checkpoint(teacher, tmp_path / "student", 4, "absolute", asked)


def test_the_beginning_token_and_all_end_tokens_are_refused(tmp_path) -> None:
    teacher = save_teacher(tmp_path / "teacher", spare_rows=4)
    tokenizer = load_tokenizer(teacher)
    tokenizer.add_special_tokens({"bos_token": "<s>", "extra_special_tokens": ["<end>"]})
    tokenizer.save_pretrained(teacher)
    change(teacher / "generation_config.json", eos_token_id=[1, TOKENS + 1])
    for asked in ("<s>", "<end>"):
        with pytest.raises(OpdlmError, match=r"which is (the beginning|an end)-of-sequence token"):
            convert_checkpoint(teacher, tmp_path / "student", 4, "absolute", asked)


@pytest.mark.parametrize("spare_rows", [0, 3])
@pytest.mark.parametrize("named", [None, "7", "<|endoftext|>"])
def test_another_mask_token_can_be_given(tmp_path, spare_rows, named) -> None:
    """The token that was named before is text again: it is not missing in what the tokenizer decodes."""
    teacher = save_teacher(tmp_path / "teacher", spare_rows=spare_rows)
    if named:
        change(teacher / "tokenizer_config.json", mask_token=named)
    done = CliRunner().invoke(app, ["convert", str(teacher), str(tmp_path / "student"), "--mask-token", "<m>"])
    assert done.exit_code == 0, done.stderr
    facts, tokenizer = read_facts(tmp_path / "student"), load_tokenizer(tmp_path / "student")
    assert require_mask(facts) == tokenizer.mask_token_id == TOKENS
    assert (tokenizer.mask_token, facts.vocab_size) == ("<m>", max(TOKENS + spare_rows, TOKENS + 1))
    assert tokenizer.decode(tokenizer("1+7=")["input_ids"], skip_special_tokens=True) == "1+7="


@pytest.mark.parametrize("tied", [False, True])
def test_every_row_of_the_embedding_learns(tmp_path, tied) -> None:
    """A padding index would keep its row, such as one that became the mask, from ever getting a gradient."""
    teacher = save_teacher(tmp_path / "teacher", tied=tied)
    mask = convert_checkpoint(teacher, tmp_path / "student", 4, "response")
    for padding in (0, mask, 5):
        change(tmp_path / "student" / "config.json", pad_token_id=padding)
        model = load_model(tmp_path / "student")
        embedding = model.get_input_embeddings()
        looked_up = embedding(torch.tensor([[padding, mask]]))
        (gradient,) = torch.autograd.grad(looked_up.sum(), embedding.weight)
        assert gradient[[padding, mask]].all()


@pytest.mark.parametrize("found", ["17", -1, TOKENS + 1, 99, True, 2.0, [TOKENS]])
def test_a_mask_id_that_is_no_row_is_named(teacher, tmp_path, found) -> None:
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    change(tmp_path / "student" / "config.json", mask_token_id=found)
    with pytest.raises(OpdlmError, match=r"config.json: mask_token_id is .*; expected a token id, from 0 to 17"):
        read_facts(tmp_path / "student")


@pytest.mark.parametrize(("token", "reason"), REFUSED)
def test_a_student_with_a_wrong_mask_token_is_refused(teacher, tmp_path, token, reason) -> None:
    student = tmp_path / "student"
    convert_checkpoint(teacher, student, 4, "absolute")
    change(student / "config.json", mask_token_id=load_tokenizer(teacher).convert_tokens_to_ids(token))
    for command in (["generate", str(student), "-p", "1+2="], ["export", str(student), "DST", "--layout", "qwen3"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2
        assert f"which is {reason}" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_mask_token_behind_the_matrices_is_named(teacher, tmp_path) -> None:
    tokenizer = load_tokenizer(teacher)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<a>", "<b>"]})
    tokenizer.add_special_tokens({"mask_token": "<m>"})
    tokenizer.save_pretrained(teacher)
    with pytest.raises(OpdlmError, match="gives the mask token id 19, but the embedding has 17 rows"):
        convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    with pytest.raises(OpdlmError, match="the mask token has id 19, but the matrices have 17 rows"):
        require_mask(read_facts(teacher))


def test_a_new_token_never_takes_the_id_of_another(teacher, tmp_path) -> None:
    """Where a tokenizer leaves out an id, the library gives a new token an id that is taken."""
    raw = json.loads((teacher / "tokenizer.json").read_text())
    del raw["model"]["vocab"]["5"]
    (teacher / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(OpdlmError, match="a new token would get the id 16 of another one"):
        convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")


def test_a_student_keeps_its_mask_token(teacher, tmp_path) -> None:
    """Also one whose tokenizer does not name it, as those of some public students."""
    mask = convert_checkpoint(teacher, tmp_path / "student", 4, "absolute", "<m>")
    change(tmp_path / "student" / "tokenizer_config.json", mask_token=None)
    assert convert_checkpoint(tmp_path / "student", tmp_path / "again", 8, "absolute") == mask
    assert load_tokenizer(tmp_path / "again").mask_token == "<m>"
    with pytest.raises(OpdlmError, match="is a student already, with mask token id 17"):
        convert_checkpoint(tmp_path / "student", tmp_path / "third", 8, "absolute", "<other>")
