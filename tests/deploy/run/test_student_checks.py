"""Students that do not go with lossless decoding are refused. `pytest tests/deploy/run/test_student_checks.py`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import LoraConfig
from opdlm.common.errors import ConfigError
from opdlm.common.model.adapters import NoisyAdapters, write_noisy_adapters
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.load import load_model
from opdlm.deploy.run.preflight import preflight
from tests.tiny import save_teacher

NOISY = {"rank": 2, "tokens": "noisy"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A teacher, a student of the paper's form, one of the other form, and a lossless one."""
    root = tmp_path_factory.mktemp("students")
    teacher = save_teacher(root / "teacher")
    convert_checkpoint(teacher, root / "paper", 4, "response")
    for name in ("plain", "lossless"):
        convert_checkpoint(teacher, root / name, 4, "response", None, True, "causal")
    student, facts = load_model(root / "lossless"), read_facts(root / "lossless")
    NoisyAdapters(student, LoraConfig(**NOISY), require_mask(facts), seed=0)
    write_noisy_adapters(student, root / "lossless")
    return {path.name: path for path in root.iterdir()}


def check(folders: dict[str, Path], tmp_path: Path, model: dict[str, Any], verified: bool = True) -> None:
    drafts = {"strategy": "verified", "temperature": 0} if verified else {}
    config = {
        "run": {"dir": str(tmp_path / "run"), "rounds": 1},
        "model": {"teacher": str(folders["teacher"]), "dtype": "float32", **model},
        "data": {"task": "chain", "prompts": 8},
        "rollout": {"block_size": 4, "block_grid": "response", "prompts_per_round": 4, "max_new_tokens": 12, **drafts},
        "objective": {"selection": "drafts"} if verified else {},
        "learner": {"batch_size": 4},
        "evaluation": {"final_problems": 0},
    }
    preflight(config_from_dict(config))


@pytest.mark.parametrize(
    ("model", "verified", "message"),
    [
        ({}, True, r"model: found a student with no logit shift.*set model\.logit_shift and model\.context"),
        ({"student": "paper"}, True, r"model\.student: .*rollout\.strategy `verified` needs logit shift"),
        ({"student": "paper", "lora": NOISY}, False, r"model\.student: .*model\.lora\.tokens `noisy` needs"),
        ({"student": "lossless"}, True, r"model\.lora: found None, but the student .* has adapters with"),
        ({"student": "lossless", "lora": NOISY | {"rank": 3}}, True, r"model\.lora: found .*'rank': 3.* give the same"),
        ({"lora": NOISY}, True, r"model\.logit_shift: found None with model\.lora\.tokens `noisy`"),
    ],
)
def test_what_does_not_go_together_is_refused(folders, tmp_path, model, verified, message) -> None:
    given = model | ({"student": str(folders[model["student"]])} if "student" in model else {})
    with pytest.raises(ConfigError, match=message):
        check(folders, tmp_path, given, verified)


def test_what_goes_together_is_taken(folders, tmp_path) -> None:
    both = {"logit_shift": True, "context": "causal"}
    check(folders, tmp_path, both | {"lora": NOISY})
    check(folders, tmp_path, both)
    for name in ("plain", "lossless"):
        check(folders, tmp_path, {"student": str(folders[name]), "lora": NOISY})
