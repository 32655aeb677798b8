"""Students that do not go with lossless decoding are refused. `pytest tests/deploy/run/test_student_checks.py`"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.common.config.schema import LoraConfig
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.model.adapters import NOISY_FILE, NoisyAdapters, write_noisy_adapters
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.load import load_model
from opdlm.common.model.shards import model_fingerprint
from opdlm.deploy.run.preflight import check_weights, preflight
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


def check(folders: dict[str, Path], tmp_path: Path, model: dict[str, Any], verified: bool = True) -> OpdlmConfig:
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
    preflight(checked := config_from_dict(config))
    return checked


@pytest.mark.parametrize(
    ("model", "verified", "message"),
    [
        ({"student": "paper", "lora": NOISY}, True, r"model\.student: .*model\.lora\.tokens `noisy` needs"),
        ({"student": "lossless"}, False, r"model\.lora: found None, but the student .* has adapters with"),
        ({"student": "plain"}, True, r"model\.lora: found no adapters on noisy tokens .*set lora\.tokens to `noisy`"),
        ({"student": "plain", "lora": NOISY | {"tokens": "all"}}, True, r"model\.lora: found no adapters on noisy"),
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
    check(folders, tmp_path, both, verified=False)
    for name in ("plain", "lossless"):
        check(folders, tmp_path, {"student": str(folders[name]), "lora": NOISY})


def test_a_student_with_another_base_than_the_teacher_is_refused(folders, tmp_path) -> None:
    """Its clean path would be its own base model, and training would go towards that, unsaid."""

    def check_base_of(name: str, teacher: Path) -> None:
        model = {"teacher": str(teacher), "student": str(folders[name]), "lora": NOISY}
        check_weights(check(folders, tmp_path, model))

    for name in ("plain", "lossless"):
        check_base_of(name, folders["teacher"])
    changed = tmp_path / "changed"
    shutil.copytree(folders["teacher"], changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.5
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"model\.student: .* has other values in model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        check_base_of("lossless", changed)


def test_adapters_that_are_no_numbers_or_lost_are_refused(folders, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["lossless"], broken)
    fingerprint = model_fingerprint(broken)
    adapters = load_file(broken / NOISY_FILE)
    next(iter(adapters.values())).flatten()[0] = float("nan")
    save_file(adapters, broken / NOISY_FILE)
    config = check(folders, tmp_path, {"student": str(broken), "lora": NOISY})
    with pytest.raises(OpdlmError, match="values that are NaN or infinite"):
        check_weights(config)
    assert model_fingerprint(broken) != fingerprint
    (broken / NOISY_FILE).write_bytes(b"x")
    with pytest.raises(OpdlmError, match=rf"{NOISY_FILE} cannot be read"):
        load_model(broken)
    (broken / NOISY_FILE).unlink()
    with pytest.raises(OpdlmError, match=rf"{NOISY_FILE} is missing, which config\.json names"):
        load_model(broken)


def test_loading_adapters_leaves_random_numbers_alone(folders) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model(folders["lossless"])
    assert torch.equal(torch.rand(3), expected)
