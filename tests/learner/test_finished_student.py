"""A finished student has all that decodes it in its folder. `pytest tests/learner/test_finished_student.py`"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from opdlm.common.config import config_from_dict
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import load_model
from opdlm.common.weights import WeightPacker
from opdlm.learner.saving import Saver, forget_student
from tests.tiny import save_teacher


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_given_student_that_names_no_block_size_gets_the_runs(tmp_path, one_rank) -> None:
    teacher, start = save_teacher(tmp_path / "teacher"), tmp_path / "start"
    convert_checkpoint(teacher, start, 4, "absolute")
    raw = json.loads((start / "config.json").read_text())
    plain = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "mask_token_id": raw["mask_token_id"]}
    named = ("auto_map", "block_size", "block_grid")
    (start / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in named} | plain))
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"teacher": str(teacher), "student": str(start), "dtype": "float32"},
        "data": {"task": "chain", "prompts": 8},
        "rollout": {"block_size": 8, "block_grid": "response"},
        "evaluation": {"order": "sequential"},
    }
    trained = load_model(start)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.5)
    pack = WeightPacker().pack(1, trained.named_parameters())
    engine = SimpleNamespace(device="cpu", module=SimpleNamespace(student=trained))
    saver = Saver(engine, tmp_path / "run" / "checkpoints", keep=1, max_failed=0)
    saver.export_student(tmp_path / "run", str(start), config_from_dict(settings), pack)

    student = tmp_path / "run" / "student"
    facts, raw = read_facts(student), json.loads((student / "config.json").read_text())
    assert (facts.block_size, facts.block_grid, facts.order) == (8, "response", "sequential")
    assert facts.mask_id == plain["mask_token_id"]
    assert raw["model_type"] == "a2d-qwen3"
    assert raw["auto_map"]["AutoModelForMaskedLM"] == "modeling_a2d.A2DQwen3LMHeadModel"
    assert {"modeling_a2d.py", "block_causal.py", "tokenizer.json"} <= {file.name for file in student.iterdir()}
    for name, tensor in load_model(student).state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name


def test_a_run_that_trains_further_removes_the_student_of_its_early_stop(tmp_path) -> None:
    for name in ("student", "adapter", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("of round 3")
    forget_student(tmp_path)
    forget_student(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
