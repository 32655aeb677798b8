"""A teacher that accelerate spreads gives the same targets as one on a single device.

`pytest tests/actors/teacher/test_backends.py`
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opdlm.actors.teacher.backends import make_backend, refuse_offload
from opdlm.actors.teacher.generation import generate
from opdlm.actors.teacher.scoring import score
from opdlm.common.config.schema import TeacherConfig
from opdlm.common.errors import OpdlmError
from tests.tiny import EOS, tiny_model, trajectory

pytest.importorskip("accelerate")
TRAJECTORIES = [
    trajectory([5, 6, 7], [8, 9, 10, 11, EOS, 13, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 7, 9], 5),
    trajectory([5], [9, 3, 3, 3], [1, 1, 2, 2]),
]
PROMPTS = [t.prompt_ids for t in TRAJECTORIES]
FIELDS = {"hidden": ["hidden"], "topk": ["token_ids", "logprobs"], "logits": ["logits"]}


@pytest.fixture
def folder(tmp_path) -> str:
    tiny_model(1).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def _assert_same(kind: str, found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        for field in FIELDS[kind]:
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


@pytest.mark.parametrize("kind", list(FIELDS))
def test_device_map_changes_no_target(folder, kind, monkeypatch) -> None:
    load, asked = AutoModelForCausalLM.from_pretrained, []
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.append(k["device_map"]) or load(*a, **k)
    )
    config = {"targets": kind, "top_k": 4, "dtype": "float32"}
    plain, spread = (
        make_backend(folder, TeacherConfig.model_validate(config | {"device_map": d})) for d in ("none", "auto")
    )
    assert asked == [None, "cpu"], "without a share of GPUs, the CPU"
    _assert_same(kind, spread.score(TRAJECTORIES), plain.score(TRAJECTORIES))
    answers = [b.generate(PROMPTS, 6, 2, 0.0, 0) for b in (spread, plain)]
    assert [a.tolist() for a in answers[0]] == [a.tolist() for a in answers[1]]


@pytest.mark.parametrize("kind", list(FIELDS))
def test_layers_in_different_places_work_together(folder, tmp_path, kind) -> None:
    """Half of the model is on disk, the only second place without a GPU: accelerate's hooks move every part."""
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32
    ).eval()
    assert spread.lm_head.weight.device.type == "meta", "not in memory"
    plain = tiny_model(1)
    found, expected = (score(m, TRAJECTORIES, kind, 4, 64) for m in (spread, plain))
    _assert_same(kind, found, expected)
    answers = [generate(m, PROMPTS, 6, [EOS], 2) for m in (spread, plain)]
    assert [a.tolist() for a in answers[0]] == [a.tolist() for a in answers[1]]


def test_a_teacher_that_spills_into_host_memory_is_refused() -> None:
    refuse_offload({"model.layers.0": 0, "model.layers.1": 1}, "folder")
    with pytest.raises(
        OpdlmError, match=r"does not fit the actor's GPUs: 1 of 2 parts \(first `lm_head`\) .* on the cpu"
    ):
        refuse_offload({"model.layers.0": 0, "lm_head": "cpu"}, "folder")
