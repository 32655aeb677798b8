"""Students with a logit shift or causal context (METHOD.md section 11). `pytest tests/test_forms.py`"""

from __future__ import annotations

import json

import pytest
import torch

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.observation import StepObservation
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.config import load_config
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.export import export
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.deploy.run.preflight import preflight
from tests.tiny import EOS, MASK, request, save_teacher, tiny_model


@pytest.mark.parametrize("grid", ["response", "absolute"])
@pytest.mark.parametrize("shift", [True, False])
@torch.no_grad()
def test_an_untrained_student_predicts_first_positions_as_its_teacher(shift, grid) -> None:
    """With a logit shift and causal context, exactly; without either of them, it does not."""
    model, seen = tiny_model(5), []
    form = StudentForm(shift, "causal" if grid == "response" else "block_causal")

    def observe(view: StepObservation) -> None:
        seen.extend(
            (view.index[row], int(view.positions[row, 0]), view.logits[row, 0].clone())
            for row in range(len(view.index))
            if view.masked[row, 0]
        )

    settings = DecodeSettings(4, grid, "random", temperature=1.0, ignore_eos=True)
    requests = [request(length, i, 15, seed=i) for i, length in enumerate((3, 4, 8, 9))]
    trajectories, _ = BlockDecoder(model, settings, MASK, [EOS], 2, form=form).decode(requests, observer=observe)
    assert len(seen) > 16
    differences = []
    for index, position, logits in seen:
        one = trajectories[index]
        ids = torch.tensor([[*one.prompt_ids.tolist(), *one.response_ids.tolist()]])
        teacher = model(input_ids=ids[:, :position]).logits[0, -1]
        teacher[MASK] = float("-inf")
        differences.append(float((teacher.log_softmax(-1) - logits.log_softmax(-1)).nan_to_num(0).abs().max()))
    if form == StudentForm(True, "causal"):
        assert max(differences) < 1e-4
    else:
        assert max(differences) > 0.1


def test_convert_writes_the_form_and_keeps_that_of_a_student(tmp_path) -> None:
    save_teacher(tmp_path / "teacher")
    convert_checkpoint(tmp_path / "teacher", tmp_path / "paper", 4, "response")
    assert read_facts(tmp_path / "paper").form == PAPER_FORM
    convert_checkpoint(tmp_path / "teacher", tmp_path / "both", 4, "response", logit_shift=True, context="causal")
    raw = json.loads((tmp_path / "both" / "config.json").read_text())
    assert (raw["logit_shift"], raw["context"]) == (True, "causal")
    convert_checkpoint(tmp_path / "both", tmp_path / "eight", 8, "response")
    assert read_facts(tmp_path / "eight").form == StudentForm(True, "causal")
    convert_checkpoint(tmp_path / "both", tmp_path / "one", 4, "absolute", context="block_causal")
    assert read_facts(tmp_path / "one").form == StudentForm(True, "block_causal")
    with pytest.raises(OpdlmError, match=r"causal context needs the block grid `response`.*found `absolute`"):
        convert_checkpoint(tmp_path / "both", tmp_path / "new", 4, "absolute")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layout", ["sdar", "qwen3"])
def test_layouts_whose_readers_know_only_the_papers_form_refuse_others(tmp_path, layout) -> None:
    save_teacher(tmp_path / "teacher")
    convert_checkpoint(tmp_path / "teacher", tmp_path / "student", 4, "response", context="causal")
    with pytest.raises(OpdlmError, match="found no logit shift, causal context; use a2d-qwen3"):
        export(tmp_path / "student", tmp_path / "new", layout)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"logit_shift": "yes"}, "logit_shift is 'yes'; expected true or false"),
        ({"logit_shift": 1}, "logit_shift is 1; expected true or false"),
        ({"context": "both"}, "context is 'both'; expected one of block_causal, causal"),
        ({"context": ["causal"]}, "expected one of block_causal, causal"),
        ({"context": "causal", "block_grid": "absolute"}, "context is 'causal', which needs block_grid 'response'"),
    ],
)
def test_a_form_that_cannot_be_is_refused(tmp_path, change, problem) -> None:
    save_teacher(tmp_path / "teacher")
    convert_checkpoint(tmp_path / "teacher", tmp_path / "student", 4, "response")
    file = tmp_path / "student" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(OpdlmError) as error:
        read_facts(tmp_path / "student")
    assert problem in str(error.value)


def test_a_run_follows_its_student(tmp_path) -> None:
    save_teacher(tmp_path / "teacher")
    convert_checkpoint(tmp_path / "teacher", tmp_path / "student", 4, "response", logit_shift=True, context="causal")
    run = {
        "model": {"teacher": str(tmp_path / "teacher"), "student": str(tmp_path / "student")},
        "data": {"task": "chain", "prompts": 8},
        "rollout": {"block_grid": "response", "prompts_per_round": 4, "max_new_tokens": 16},
        "learner": {"batch_size": 4},
        "evaluation": {"final_problems": 0},
    }

    def checked(**model):
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps(run | {"model": run["model"] | model}))
        return preflight(load_config(file))

    assert checked().form == checked(context="causal").form == StudentForm(True, "causal")
    assert checked(student=None).form == PAPER_FORM
    assert checked(student=None, logit_shift=True).form == StudentForm(True, "block_causal")
    with pytest.raises(ConfigError, match=r"model.logit_shift: found False, but the student .* was made for True"):
        checked(logit_shift=False)
    with pytest.raises(ConfigError, match=r"model.context: found 'block_causal', but the student"):
        checked(context="block_causal")
    run["rollout"]["block_grid"] = "absolute"
    with pytest.raises(ConfigError, match=r"model.context: found 'causal' with rollout.block_grid 'absolute'; set"):
        checked(context="causal")
