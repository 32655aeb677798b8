"""NaN and infinity in weights: found at load, in pushes and before they are published, and named by tensor.

`pytest tests/common/test_broken_weights.py`
"""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.load import load_model, load_output_matrix
from opdlm.common.tensors import is_finite
from opdlm.common.weights import WeightPacker, load_weights
from opdlm.deploy.cli import app
from tests.tiny import save_teacher, tiny_model

NAN, INFINITY = float("nan"), float("inf")
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


def break_tensor(folder, name: str, value: float) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-2] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def teacher(tmp_path):
    return save_teacher(tmp_path / "teacher")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_single_broken_value_is_found_and_large_ones_are_not_broken(dtype) -> None:
    largest = torch.finfo(dtype).max
    whole = torch.tensor([largest, largest, -largest, 0.0] * 50, dtype=dtype)
    for tensor in (whole, whole.view(4, 5, 10), whole[3], whole[:0], whole.view(20, 10).T, whole[::7]):
        assert is_finite(tensor)
    for value in (NAN, INFINITY, -INFINITY):
        for place in (0, 77, 199):
            broken = whole.clone()
            broken[place] = value
            assert not is_finite(broken)
            assert not is_finite(broken[place])
    assert is_finite(torch.arange(5))
    assert is_finite(torch.tensor([True]))


@pytest.mark.parametrize(("name", "value"), [(NORM, NAN), (DOWN, INFINITY), ("lm_head.weight", -INFINITY)])
def test_every_command_that_reads_weights_names_the_tensor(teacher, tmp_path, name, value) -> None:
    student = tmp_path / "student"
    convert_checkpoint(teacher, student, 4, "absolute")
    for folder in (teacher, student):
        shutil.copytree(folder, tmp_path / f"whole-{folder.name}")
        break_tensor(folder, name, value)
    run = {"run": {"dir": str(tmp_path / "run")}, "data": {"task": "chain", "prompts": 64}}
    run |= {"model": {"teacher": str(teacher), "dtype": "float32"}, "rollout": {"max_new_tokens": 8}}
    (tmp_path / "converts.yaml").write_text(yaml.safe_dump(run))
    run["model"] |= {"teacher": str(tmp_path / "whole-teacher"), "student": str(student)}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(run))
    for command in (
        ["convert", teacher, tmp_path / "new"],
        ["export", student, tmp_path / "new", "--layout", "qwen3"],
        ["generate", student, "-p", "1+2="],
        ["generate", teacher, "-p", "1+2="],
        ["eval", student, "--task", "chain", "--problems", "3"],
        ["train", tmp_path / "converts.yaml"],
        ["train", tmp_path / "given.yaml"],
    ):
        done = CliRunner().invoke(app, [str(part) for part in command])
        assert done.exit_code == 2, done.output
        assert f"{name} holds 1 of " in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "new").exists()
        assert not (tmp_path / "run").exists()


def test_the_output_matrix_alone_is_checked_too(teacher) -> None:
    break_tensor(teacher, "lm_head.weight", NAN)
    with pytest.raises(OpdlmError, match=r"lm_head.weight holds 1 of 272 values that are NaN .* first at \[16, 14\]"):
        load_output_matrix(teacher, "bfloat16")


def test_a_value_too_large_for_the_number_format_is_found(teacher) -> None:
    tensors = load_file(file := teacher / "model.safetensors")
    tensors[NORM] = tensors[NORM].double() * 1e300
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(OpdlmError, match=NORM):
        load_model(teacher)


def test_pushed_weights_are_refused_by_tensor() -> None:
    sender, receiver = tiny_model(1), tiny_model(2)
    with torch.no_grad():
        sender.model.layers[1].mlp.down_proj.weight[0, 0] = NAN
    pack = WeightPacker().pack(4, sender.named_parameters())
    with pytest.raises(ValueError, match=f"weights version 4: {DOWN} holds NaN or infinity"):
        load_weights(receiver, pack)
