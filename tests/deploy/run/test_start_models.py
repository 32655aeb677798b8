"""What a failed start leaves behind, and models that change under a run.

`pytest tests/deploy/run/test_start_models.py`
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from opdlm.common.checkpoint import save_checkpoint
from opdlm.common.config import OpdlmConfig, config_from_dict, dump_config
from opdlm.common.errors import ConfigError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.shards import read_shards
from opdlm.deploy.run import start_models
from opdlm.deploy.run.directory import find_checkpoint
from opdlm.deploy.run.start_models import prepare_student
from tests.tiny import save_teacher


@pytest.fixture
def teacher(tmp_path) -> Path:
    return save_teacher(tmp_path / "teacher")


def config_of(teacher: Path, **rollout) -> OpdlmConfig:
    run = teacher.parent / "run"
    run.mkdir(exist_ok=True)
    raw = {"run": {"dir": str(run)}, "model": {"teacher": str(teacher)}, "data": {"task": "chain", "prompts": 8}}
    return config_from_dict(raw | {"rollout": rollout})


def replace_teacher(teacher: Path, seed: int = 1) -> None:
    """Another teacher of the same size in the same folder, as a second `opdlm pretrain` makes it."""
    shutil.rmtree(teacher)
    save_teacher(teacher, seed)


def embedding(folder: str | Path) -> bytes:
    return read_shards(folder).load("model.embed_tokens.weight")[:17].numpy().tobytes()


def test_a_student_of_the_same_teacher_is_used_again(teacher, monkeypatch) -> None:
    config = config_of(teacher)
    student = prepare_student(config)
    monkeypatch.setattr(start_models, "convert_checkpoint", lambda *_: pytest.fail("it was converted again"))
    assert prepare_student(config) == student == str(teacher.parent / "run" / "student_init")


def test_a_student_of_another_teacher_block_size_or_grid_is_made_anew(teacher) -> None:
    student = prepare_student(config_of(teacher))
    assert embedding(student) == embedding(teacher)
    replace_teacher(teacher)
    assert embedding(student) != embedding(teacher)
    prepare_student(config_of(teacher))
    assert embedding(student) == embedding(teacher)
    for rollout in ({"block_size": 8}, {"block_size": 8, "block_grid": "response"}):
        prepare_student(config_of(teacher, **rollout))
        facts = read_facts(student)
        assert (facts.block_size, facts.block_grid) == (8, rollout.get("block_grid", "absolute"))
    tokenizer = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 77}))
    prepare_student(config_of(teacher))
    assert json.loads((Path(student) / "tokenizer_config.json").read_text())["model_max_length"] == 77


def test_what_a_killed_process_left_half_made_is_made_anew(teacher) -> None:
    config = config_of(teacher)
    run = Path(config.run.dir)
    (run / ".student_init.123").mkdir()
    convert_checkpoint(teacher, run / "student_init", 8, "response")  # a student without a word on what made it
    prepare_student(config)
    assert read_facts(run / "student_init").block_size == 4
    assert {path.name for path in run.iterdir()} == {"student_init", "models.json"}


@pytest.fixture
def begun(teacher) -> OpdlmConfig:
    """The config of a run with a checkpoint."""
    config = config_of(teacher)
    prepare_student(config)
    run = Path(config.run.dir)
    (run / "config.yaml").write_text(dump_config(config))
    state = {"rounds": 1, "data_digest": "digest"}
    save_checkpoint(run / "checkpoints", state, lambda folder: None, keep=1)
    return config


def test_a_run_is_not_resumed_on_another_teacher(begun) -> None:
    teacher = Path(begun.model.teacher)
    assert find_checkpoint(begun, True, "digest").rounds == 1
    before = embedding(Path(begun.run.dir) / "student_init")
    replace_teacher(teacher)
    with pytest.raises(ConfigError, match=r"model.teacher: .*teacher has changed since .*run was started with it") as e:
        find_checkpoint(begun, True, "digest")
    assert "\n" not in str(e.value)
    assert embedding(Path(begun.run.dir) / "student_init") == before
    replace_teacher(teacher, seed=0)
    assert find_checkpoint(begun, True, "digest").rounds == 1


def test_a_given_student_that_changes_is_named(teacher, tmp_path) -> None:
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    config = config_of(teacher)
    config = config.model_copy(update={"model": config.model.model_copy(update={"student": str(tmp_path / "student")})})
    assert prepare_student(config) == str(tmp_path / "student")
    run = Path(config.run.dir)
    (run / "config.yaml").write_text(dump_config(config))
    (run / "metrics.jsonl").touch()
    assert find_checkpoint(config, True, "digest") is None
    shutil.rmtree(tmp_path / "student")
    convert_checkpoint(save_teacher(tmp_path / "other", 3), tmp_path / "student", 4, "absolute")
    with pytest.raises(ConfigError, match=r"model.student: .*student has changed since"):
        find_checkpoint(config, True, "digest")


def test_a_run_of_an_earlier_version_keeps_its_student(begun, monkeypatch) -> None:
    """It has no models.json. Its checkpoints belong to its student, so the student is not made anew."""
    (Path(begun.run.dir) / "models.json").unlink()
    monkeypatch.setattr(start_models, "convert_checkpoint", lambda *_: pytest.fail("it was converted again"))
    find_checkpoint(begun, True, "digest")
    prepare_student(begun)
