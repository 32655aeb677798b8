"""Input that nobody meant to give, through the command line: one line, exit code 2, nothing started.

`pytest tests/deploy/cli/test_bad_input.py`
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import opdlm as api
from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from tests.deploy.cli.test_cli import opdlm


@pytest.fixture(scope="module")
def student(chain_teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "student"
    convert_checkpoint(chain_teacher, folder, 4, "absolute")
    return folder


@pytest.fixture
def run_file(chain_teacher, tmp_path) -> Path:
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"teacher": str(chain_teacher), "dtype": "float32"},
        "data": {"path": str(tmp_path / "d.jsonl")},
        "rollout": {"max_new_tokens": 20},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "nan"), ("--temperature", "inf"), ("--threshold", "nan"), ("--top-p", "nan"), ("--seed", 2**64)],
)
def test_numbers_of_generate(student, option, value) -> None:
    text = opdlm("generate", student, "-p", "1+2=", option, value, code=2)
    assert option in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("sweep", "CKPT", "--task", "chain", "--threshold", "nan"),
            "--threshold: found 'nan'; each has to lie within",
        ),
        (("eval", "CKPT", "--task", "chain", "--gpus-per-actor", "inf"), "--gpus-per-actor: found inf; expected a f"),
        (("pretrain", "NEW", "--task", "chain", "--lr", "nan"), "--lr"),
        (("pretrain", "NEW", "--task", "chain", "--heads", "0"), "--heads"),
        (("compare", "RUN", "--seeds", "0,1,00"), "--seeds: found 0,1,0; a run counts once, so give each of them once"),
        (("compare", "RUN", "--seeds", "0,²"), "--seeds: found '0,²'; expected numbers such as 0,1,2"),
        (("compare", "RUN", "--objectives", "cft,cft"), "--objectives: found cft,cft; a run counts once"),
    ],
)
def test_numbers_of_other_commands(student, run_file, tmp_path, arguments, message) -> None:
    places = {"CKPT": student, "NEW": tmp_path / "new", "RUN": run_file}
    assert message in opdlm(*(places.get(a, a) for a in arguments), code=2)
    assert not (tmp_path / "new").exists()


def test_the_home_folder_in_every_path(student, run_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}')
    (tmp_path / "ckpt").symlink_to(student)
    assert "1 kept, 0 refused" in opdlm("train", "~/run.yaml", "--dry-run", "--set", "data.path=~/d.jsonl")
    assert "1 kept" in opdlm("plan", "~/run.yaml", "--json=~/plan.json")
    opdlm("generate", "~/ckpt", "-p", "1+2=", "--max-new-tokens", 4)
    opdlm("eval", "~/ckpt", "--data=~/d.jsonl", "--max-new-tokens", 4, "--output=~/o.json")
    assert json.loads((tmp_path / "o.json").read_text())["rows"]
    opdlm("export", "~/ckpt", "~/sdar", "--layout", "sdar")
    assert {"plan.json", "sdar"} <= {path.name for path in tmp_path.iterdir()}
    assert api.load("~/ckpt").facts.is_student
    assert "there is no home folder ~nobody-here" in opdlm("generate", "~nobody-here/x", "-p", "1", code=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (r'{"prompt": "1\ud800"}', "data.prompt_field: d.jsonl:2: `prompt` holds a lone surrogate, \\ud800"),
        (r'{"prompt": "1\u0000"}', "data.prompt_field: d.jsonl:2: `prompt` holds a NUL character (character 2)"),
        ('{"prompt": ' + "[" * 99999 + "]" * 99999 + "}", "data.path: d.jsonl:2 is not JSON that can be read: it is"),
        ('{"prompt": "1", "domain": 7}', "data.domain_field: d.jsonl:2: `domain` is 7; expected text"),
        ('{"prompt": [{"role": "human", "content": "1"}]}', "data.prompt_field: d.jsonl:2: message 1 has role 'human'"),
        ('{"prompt": [-1]}', "data.prompt_field: d.jsonl:2 has token id -1; the teacher's are 0 to"),
    ],
)
def test_rows_of_a_run(run_file, tmp_path, row, message) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+2="}\n' + row)
    assert message in opdlm("train", run_file, code=2)
    assert not (tmp_path / "run").exists()


def test_rows_and_prompts_of_eval_and_generate(student, tmp_path) -> None:
    data = tmp_path / "q.jsonl"
    for row, message in (
        (r'{"prompt": "1", "answer": "\ud800"}', "--answer-field: q.jsonl:1: `answer` holds a lone surrogate"),
        ('{"prompt": "", "answer": "1"}', "--prompt-field: q.jsonl:1: the prompt is empty; give every row a prompt"),
        ('{"prompt": [{"role": "user", "content": "1"}], "answer": "1"}', "--chat: q.jsonl:1: `prompt` holds chat"),
        ('{"prompt": [{"role": "user", "content": 1}], "answer": "1"}', "--prompt-field: q.jsonl:1: message 1 (user)"),
    ):
        data.write_text(row)
        assert message in opdlm("eval", student, "--data", data, code=2)
    assert "is a folder; expected a JSONL" in opdlm("eval", student, "--data", _folder(tmp_path / "f.jsonl"), code=2)
    assert "prompt '1\\udcff' holds a lone surrogate" in opdlm("generate", student, "-p", "1\udcff", code=2)
    assert "prompt '1\\x002' holds a NUL character" in opdlm("generate", student, "-p", "1\0002", code=2)
    assert "prompt '': the prompt is empty" in opdlm("generate", student, "-p", "", code=2)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_prompts_of_python(student) -> None:
    model = api.load(student)
    for prompts, message in (
        ("1+2=", "prompts: found one text; expected a list of texts"),
        ([3], "prompts: prompt 1 is 3; expected text"),
        (["1", [{"role": "user", "content": "1"}]], "prompts: prompt 2 is"),
        ([b"1"], "prompts: prompt 1 is b'1'; expected text"),
    ):
        with pytest.raises(OpdlmError, match=message.replace("(", r"\(")):
            model.generate(prompts)
    for number in (float("nan"), float("inf"), -1.0, "1", True):
        with pytest.raises(OpdlmError, match=r"temperature: found .*; expected a finite number from 0"):
            model.generate(["1"], temperature=number)


def test_text_files_of_pretrain(tmp_path) -> None:
    for content, message in ((b"ab\xff", "is not text: 'utf-8' codec"), (b"ab\0", "holds a NUL character")):
        (tmp_path / "t.txt").write_bytes(content)
        assert message in opdlm("pretrain", tmp_path / "new", "--text", tmp_path / "t.txt", code=2)


def test_characters_that_the_tokenizer_does_not_know_are_told(student, run_file, tmp_path) -> None:
    rows = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "1×2é=", "answer": "½"}]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    first = "first in d.jsonl:2: '×' (U+00D7) in '1×2é='"
    told = f"unknown characters: 2 in 1 texts; the model reads the unknown token `<|unk|>` instead; {first}"
    assert told in opdlm("train", run_file, "--dry-run")
    assert told in opdlm("plan", run_file)
    text = opdlm("train", run_file, "--dry-run", "--set", "data.response_field=answer")
    assert "unknown characters: 3 in 2 texts" in text
    text = opdlm("eval", student, "--data", tmp_path / "d.jsonl", "--max-new-tokens", 4)
    assert f"unknown characters: 3 in 2 texts; the model reads the unknown token `<|unk|>` instead; {first}" in text
    text = opdlm("generate", student, "-p", "1×2=", "--max-new-tokens", 4)
    assert "unknown characters: 1 in 1 texts" in text
    assert "first in prompt '1×2=': '×' (U+00D7)" in text
    assert "unknown characters" not in opdlm("generate", student, "-p", "1+2=", "--max-new-tokens", 4)


def test_a_limit_for_a_domain_that_no_row_has_is_told(run_file, tmp_path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+2=", "domain": "math"}')
    text = opdlm("train", run_file, "--dry-run", "--set", "curriculum.max_new_tokens_per_domain={maths: 5}")
    assert "curriculum.max_new_tokens_per_domain: no row has the domain maths; the rows' domains are math" in text
