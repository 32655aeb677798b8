"""`opdlm convert` with folders, GGUF files and hub ids. `pytest tests/deploy/cli/test_convert.py`"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import load_model
from opdlm.deploy.evaluate.generation import Model
from tests.deploy.cli.test_cli import opdlm
from tests.gguf_files import save_gguf
from tests.tiny import save_teacher

PROMPTS = ["47+8=", "1+2-3=", "9-5+4-1="]


def test_a_gguf_file_becomes_a_student_a_teacher_or_both(tmp_path) -> None:
    file = tmp_path / "m.gguf"
    save_gguf(file)
    assert "block size 8, response grid" in opdlm(
        "convert", file, tmp_path / "one", "--block-size", 8, "--block-grid", "response", "--mask-token", "<|M|>"
    )
    printed = opdlm("convert", file, tmp_path / "student", "--teacher", tmp_path / "ar", "--dtype", "float32")
    assert f"{tmp_path}/ar: the autoregressive model in float32" in printed
    assert f"{tmp_path}/student: mask token id 261, block size 4, absolute grid" in printed
    one, student = read_facts(tmp_path / "one"), read_facts(tmp_path / "student")
    assert (one.is_student, one.block_size, one.block_grid) == (True, 8, "response")
    assert (student.is_student, student.block_size) == (True, 4)
    assert not read_facts(tmp_path / "ar").is_student
    assert load_model(tmp_path / "one", "auto").dtype == torch.bfloat16
    assert load_model(tmp_path / "student", "auto").dtype == AutoModelForCausalLM.from_pretrained(tmp_path / "ar").dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ar", "m.gguf", "one", "student"]


def test_a_student_keeps_its_decoding_order_and_is_decoded_by_it(tmp_path) -> None:
    source, first, second, third = save_teacher(tmp_path / "source"), *(tmp_path / name for name in "abc")
    printed = opdlm("convert", source, first, "--decoding-order", "sequential")
    assert printed.endswith("block-causal context, decoding order sequential")
    opdlm("convert", first, second, "--block-size", 8)
    assert "decoding order" not in opdlm("convert", second, third, "--decoding-order", "confidence")
    for folder, own, other in (
        (second, "sequential_dynamic", "low_confidence_dynamic"),
        (third, "low_confidence_dynamic", "sequential_dynamic"),
    ):
        model = Model(folder)
        usual, same, different = (
            [one.ids.tolist() for one in model.generate(PROMPTS, max_new_tokens=16, threshold=0.5, strategy=strategy)]
            for strategy in (None, own, other)
        )
        assert usual == same
        assert usual != different
    file = third / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decoding_order": "random"}))
    error = opdlm("convert", third, tmp_path / "d", code=2)
    assert "c/config.json: decoding_order is 'random'; expected one of confidence, sequential" in error


def test_the_teacher_of_a_folder_is_an_ordinary_folder(tmp_path) -> None:
    source = save_teacher(tmp_path / "source", max_shard_size="4KB")
    assert opdlm("convert", source, "--teacher", tmp_path / "ar").endswith("ar: the autoregressive model")
    ids = AutoTokenizer.from_pretrained(tmp_path / "ar")("47+8=", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "ar")(ids).logits
        assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(source)(ids).logits)
    opdlm("convert", source, tmp_path / "student")
    error = opdlm("convert", tmp_path / "student", "--teacher", tmp_path / "other", code=2)
    assert "is a student, with weights of its own; there is no autoregressive model in it" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SOURCE"], "convert: no folder to write; give DST for a student, or --teacher DST for the model itself"),
        (["SOURCE", "--teacher", "a", "--block-size", "4"], "--block-size is for a student, and no folder for one"),
        (["SOURCE", "--teacher", "a", "--mask-token", "<|m|>"], "--mask-token is for a student"),
        (["SOURCE", "a", "--teacher", "a"], "convert: DST and --teacher are both a; give each a folder of its own"),
        (["SOURCE", "--teacher", "a", "--decoding-order", "sequential"], "--decoding-order is for a student"),
        (["SOURCE", "a", "--dtype", "float32"], "--dtype: found float32; it is for GGUF files"),
        (["SOURCE", "a", "--teacher", "SOURCE"], "exists; give a new folder"),
        (["nothing.gguf", "a"], "convert: nothing.gguf does not exist; expected a GGUF file"),
        (
            ["nothing/here", "a"],
            "SRC: nothing/here does not exist as a folder, and as a hub id it cannot be downloaded",
        ),
        (["nothing", "a"], "model folder nothing does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_written(tmp_path, monkeypatch, arguments, message) -> None:
    source = save_teacher(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    assert message in opdlm("convert", *(source if a == "SOURCE" else a for a in arguments), code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_run_file_that_names_a_gguf_file_gets_the_command(tmp_path, monkeypatch) -> None:
    save_gguf(tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)
    for command in (["plan"], ["train"], ["train", "--dry-run"]):
        error = opdlm(*command, "demo", "--set", "model.teacher=m.gguf", code=2)
        assert "model.teacher: m.gguf is a GGUF file; expected a model folder" in error
        assert "`opdlm convert m.gguf --teacher DST`" in error
    assert "CKPT: m.gguf is a GGUF file" in opdlm("generate", "m.gguf", "-p", "a", code=2)
