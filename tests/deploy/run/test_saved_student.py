"""The student of a run's checkpoint, read while the run may go on. `pytest tests/deploy/run/test_saved_student.py`"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from opdlm.common.checkpoint import WEIGHTS, list_checkpoints, save_checkpoint
from opdlm.common.config import dump_config
from opdlm.common.errors import OpdlmError
from opdlm.common.model.adapters import adapter_parameters, add_adapters
from opdlm.common.model.load import load_model
from opdlm.deploy.run.saved_student import is_checkpoint, open_saved_run, saved_student
from opdlm.deploy.run.start_models import prepare_student
from opdlm.learner.lora import merged_parameters
from tests.system.runs import run_config

NOISY: dict[str, Any] = {
    "model": {"logit_shift": True, "context": "causal", "lora": {"rank": 2, "tokens": "noisy"}},
    "rollout": {"block_grid": "response", "strategy": "verified", "temperature": 0.0},
    "objective": {"selection": "drafts"},
}


def begin_run(teacher: Path, folder: Path, **sections: dict[str, Any]) -> Any:
    """The directory of a run that has its start student and no checkpoint; returns its config."""
    shared = run_config(teacher, folder).model_dump(mode="json", exclude_unset=True)
    config = run_config(teacher, folder, **{name: shared.get(name, {}) | part for name, part in sections.items()})
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    prepare_student(config)
    return config


def save(folder: Path, rounds: int, weights: dict[str, torch.Tensor], keep: int = 2) -> Path:
    """Writes a checkpoint as the learner does."""
    copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
    return save_checkpoint(
        folder / "checkpoints", {"rounds": rounds}, lambda to: save_file(copies, to / WEIGHTS), keep=keep
    )


@pytest.mark.ray
def test_the_last_checkpoint_of_a_run_is_its_student(whole) -> None:
    found = open_saved_run(whole).newest()
    assert found.folder == list_checkpoints(whole / "checkpoints")[-1]
    start, state = saved_student(found.folder)
    finished = load_model(whole / "student", "auto").state_dict()
    assert start == whole / "student_init"
    assert state.keys() == finished.keys()
    assert all(state[name].equal(tensor) for name, tensor in finished.items())
    assert any(not state[name].equal(tensor) for name, tensor in load_model(start).state_dict().items())


def test_the_newest_is_a_checkpoint_else_the_finished_or_the_start_student(chain_teacher, tmp_path) -> None:
    run = tmp_path / "run"
    with pytest.raises(OpdlmError, match="holds no run"):
        open_saved_run(run)
    begin_run(chain_teacher, run)
    saved = open_saved_run(run)
    assert saved.newest().folder == run / "student_init"
    weights = dict(load_model(run / "student_init").named_parameters())
    first = save(run, 1, weights)
    (run / "checkpoints" / f".new-{first.name}.1").mkdir()  # half written
    (run / "checkpoints" / "round-000009").mkdir()  # without a manifest
    before = saved.newest()
    assert before.folder == first
    assert is_checkpoint(first)
    assert not is_checkpoint(run / "student_init")
    save(run, 1, {name: tensor + 1 for name, tensor in weights.items()})
    assert saved.newest().folder == first
    assert saved.newest().mark != before.mark
    (first / WEIGHTS).write_bytes((first / WEIGHTS).read_bytes()[:-1] + b"x")
    with pytest.raises(OpdlmError, match="the file is damaged"):
        saved_student(first)
    save(run, 2, {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"})
    with pytest.raises(OpdlmError, match=r"it lacks lm_head\.weight, which the run trains"):
        saved_student(saved.newest().folder)


def test_adapters_on_all_tokens_are_merged(chain_teacher, tmp_path) -> None:
    config = begin_run(chain_teacher, tmp_path / "run", model={"lora": {"rank": 2}})
    tuned = load_model(tmp_path / "run" / "student_init")
    add_adapters(tuned, config.model.lora, config.run.seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter.add_(0.2 * ("lora_B" in name))
    checkpoint = save(tmp_path / "run", 1, {n: p for n, p in tuned.named_parameters() if p.requires_grad})
    start, state = saved_student(checkpoint)
    merged = {n: p.clone() for n, p in merged_parameters(tuned, lambda parameters: contextlib.nullcontext())}
    plain = load_model(start)
    plain.load_state_dict(state)  # has the plain names
    assert all(parameter.equal(merged[name]) for name, parameter in plain.named_parameters())
    assert not plain.model.layers[0].self_attn.q_proj.weight.equal(
        load_model(start).model.layers[0].self_attn.q_proj.weight
    )


def test_adapters_on_noisy_tokens_stay_beside_the_base(chain_teacher, tmp_path) -> None:
    begin_run(chain_teacher, tmp_path / "run", **NOISY)
    start = load_model(tmp_path / "run" / "student_init")
    trained = {name: parameter + 0.3 for name, parameter in adapter_parameters(start)}
    _, state = saved_student(save(tmp_path / "run", 1, trained))
    assert all(state[name].equal(tensor) for name, tensor in trained.items())
    assert all(state[name].equal(tensor) for name, tensor in start.state_dict().items() if name not in trained)
    assert state.keys() == start.state_dict().keys()
