"""Loading, checks and error texts of the configuration. `pytest tests/common/config/test_config.py`"""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import BaseModel

from opdlm.actors.rollout.remasking import STRATEGIES
from opdlm.common.config import OpdlmConfig, config_from_dict, dump_config, load_config
from opdlm.common.config.schema import ObjectiveConfig, Selection, Strategy
from opdlm.common.errors import ConfigError
from opdlm.deploy.run.recipes import run_files
from opdlm.learner.states import SELECTIONS
from tests import REPOSITORY

DEMO = REPOSITORY / "deploy" / "demo.yaml"
BASE = {"model": {"teacher": "t"}, "data": {"path": "prompts.jsonl"}}


def config_with(**sections) -> OpdlmConfig:
    return config_from_dict(BASE | sections)


@pytest.mark.parametrize(
    ("rollout", "teacher", "message"),
    [
        ({"block_size": 1}, {}, r"rollout\.block_size: found 1 with rollout\.strategy `verified`; give 2 or more"),
        ({"cuda_graphs": True}, {}, r"rollout\.cuda_graphs: found true with rollout\.strategy `verified`"),
        ({}, {"targets": "logits"}, r"teacher\.targets: found 'logits' with rollouts that bring"),
    ],
)
def test_lossless_mode_refuses_what_it_cannot_do(rollout, teacher, message) -> None:
    model = {"teacher": "t", "logit_shift": True, "context": "causal", "lora": {"tokens": "noisy"}}
    verified = {"strategy": "verified", "block_grid": "response", "temperature": 0}
    with pytest.raises(ConfigError, match=message):
        config_with(model=model, rollout=verified | rollout, teacher=teacher, objective={"selection": "drafts"})


def test_a_policy_gradient_alone_starts_no_teacher() -> None:
    groups, rl = {"responses_per_prompt": 4}, {"kind": "rl"}
    assert not config_with(rollout=groups, objective=rl).starts_teachers
    for asking in ({"kind": "opd"}, rl | {"opd_weight": 0.5}):
        assert config_with(rollout=groups, objective=asking).starts_teachers
    assert config_with(objective={"kind": "cft"}).starts_teachers


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"block_sise": 4}}, "rollout.block_sise: unknown key; did you mean `block_size`?"),
        ({"learner": {"optimizer": {"learning_rat": 1}}}, "learner.optimizer.learning_rat: unknown key; known here"),
        ({"rolout": {}}, "rolout: unknown key; did you mean `rollout`?"),
        ({"rollout": {"prompts_per_call": 8}}, "rollout.prompts_per_call: is gone: requests go to an actor one by one"),
        ({"learner": {"micro_batch_rows": 8}}, "learner.micro_batch_rows: is now learner.micro_batch_tokens, the most"),
        ({"rollout": {"block_size": 0}}, "rollout.block_size: input should be greater than or equal to 1; found 0"),
        ({"rollout": {"block_size": "four"}}, "rollout.block_size: input should be a valid integer"),
        ({"model": {}}, "model.teacher: missing; it has no default"),
        ({"data": {}}, "data: found none of `task`, `path` and `sources`; give exactly one"),
        ({"data": {"task": "chain"}}, "data.prompts: missing; a task needs to know"),
        ({"rollout": {"denoising_steps": 9}}, "rollout.denoising_steps: found 9, more than rollout.block_size 4"),
        ({"teacher": {"targets": "topk"}}, "teacher.targets: found `topk` with objective.top_k 0"),
        (
            {"teacher": {"targets": "topk", "top_k": 8}, "objective": {"top_k": 16}},
            "objective.top_k: found 16, more than the 8",
        ),
        (
            {"teacher": {"backend": "vllm"}},
            "teacher.targets: found `hidden` with teacher.backend `vllm`, which gives top-K log-probabilities only; "
            "set it to `topk` (with objective.top_k of 1 to 16)",
        ),
        (
            {"teacher": {"backend": "vllm", "targets": "logits"}},
            "teacher.targets: found `logits` with teacher.backend `vllm`",
        ),
        (
            {"teacher": {"backend": "vllm", "targets": "topk", "device_map": "auto"}, "objective": {"top_k": 16}},
            "teacher.device_map: found `auto` with teacher.backend `vllm`",
        ),
        (
            {
                "teacher": {"backend": "vllm", "targets": "topk", "tensor_parallel": 4, "gpus_per_actor": 2},
                "objective": {"top_k": 16},
            },
            "teacher.tensor_parallel: found 4 with teacher.gpus_per_actor 2; an actor uses the GPUs that it reserves",
        ),
        (
            {"teacher": {"tensor_parallel": 2, "gpus_per_actor": 2}},
            "teacher.tensor_parallel: found 2 with teacher.backend `transformers`; set the backend to `vllm`",
        ),
        (
            {"teacher": {"gpus_per_actor": 2}},
            "teacher.gpus_per_actor: found 2 with teacher.device_map `none`, which uses one",
        ),
        ({"teacher": {"backend": "sglang"}}, "teacher.backend: input should be 'transformers' or 'vllm'"),
        ({"objective": {"tail": "bucket"}}, "objective.tail: `bucket` needs objective.top_k > 0"),
        ({"learner": {"batch_size": 256}}, "learner.batch_size: found 256, more than rollout.prompts_per_round 128"),
        ({"learner": {"workers": 16}}, "learner.workers: found 16, more than learner.batch_size 8"),
        (
            {"learner": {"zero": {"offload_weights": True}}},
            "learner.zero.offload_weights: needs stage 3; found stage 2",
        ),
        (
            {"learner": {"gpus_per_worker": 0.5, "workers": 2}},
            "learner.gpus_per_worker: found 0.5 with learner.workers 2; each of several ranks needs a whole GPU",
        ),
        ({"rollout": {"cuda_graphs": True}}, "rollout.cuda_graphs: found true with rollout.gpus_per_actor 0"),
        (
            {"rollout": {"weight_transport": "nixl", "gpus_per_actor": 1}},
            "rollout.weight_transport: found `nixl` with rollout.gpus_per_actor 1 and learner.gpus_per_worker 0",
        ),
        (
            {"rollout": {"weight_transport": "nixl"}, "evaluation": {"actors": 1}},
            "rollout.weight_transport: found `nixl` with evaluation.actors 1",
        ),
        ({"learner": {"gpus_per_worker": 2}}, "learner.gpus_per_worker: found 2; a rank uses one GPU"),
        ({"model": {"teacher": "t", "attention": "flex_attention"}}, "flex_attention has no backward on the CPU"),
        (
            {"curriculum": {"max_new_tokens": {"kind": "linear", "start": 100}}},
            "curriculum.max_new_tokens: `linear` needs `end` and `rounds`",
        ),
        (
            {"curriculum": {"max_new_tokens": {"kind": "linear", "start": 100, "end": 9000, "rounds": 10}}},
            "found 100 to 9000 tokens; expected within 1 and rollout.max_new_tokens 4096",
        ),
        (
            {"curriculum": {"threshold": {"start": 0.9}}, "rollout": {"strategy": "sequential"}},
            "curriculum.threshold: found with rollout.strategy `sequential`",
        ),
        (
            {"rollout": {"strategy": "verified"}, "evaluation": {"order": "sequential"}},
            "evaluation.order: found 'sequential' with rollout.strategy `verified`",
        ),
    ],
)
def test_bad_settings_are_named(sections, message) -> None:
    with pytest.raises(ConfigError) as caught:
        config_with(**sections)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({}, True),
        ({"kind": "off_policy_kd"}, True),
        ({"top_k": 4, "tail": "bucket"}, True),
        ({"top_k": 4}, False),
        ({"reverse_weight": 0.5}, False),
        ({"divergence": "jsd"}, False),
        ({"kind": "cft"}, False),
    ],
)
def test_loss_is_forward_kl_says_when_the_loss_is_the_forward_kl(objective, expected) -> None:
    assert ObjectiveConfig(**objective).loss_is_forward_kl is expected


def test_a_teacher_on_several_gpus_is_accepted() -> None:
    tensor_parallel = {"backend": "vllm", "targets": "topk", "tensor_parallel": 2, "gpus_per_actor": 2}
    assert config_with(teacher=tensor_parallel, objective={"top_k": 8}).teacher.tensor_parallel == 2
    assert config_with(teacher={"gpus_per_actor": 2, "device_map": "auto"}).teacher.device_map == "auto"
    shared = {"backend": "vllm", "targets": "topk", "gpus_per_actor": 0.5}
    assert config_with(teacher=shared, objective={"top_k": 8}).teacher.gpus_per_actor == 0.5


def test_a_single_learner_rank_may_share_a_gpu() -> None:
    assert config_with(learner={"gpus_per_worker": 0.5}).learner.gpus_per_worker == 0.5


def test_the_checks_of_targets_do_not_apply_to_cft() -> None:
    """`cft` uses no scores, so the teacher's targets do not matter (`opdlm compare` changes the objective only)."""
    for teacher in ({"targets": "topk"}, {"backend": "vllm"}, {"backend": "vllm", "targets": "topk"}):
        config = config_with(teacher=teacher, objective={"kind": "cft"}, offline={"responses": "teacher"})
        assert config.objective.top_k == 0


def test_every_mistake_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config_with(rollout={"block_size": 0, "batch_sise": 3}, learner={"workers": -1})
    assert len(str(caught.value).splitlines()) == 3


def test_dumping_and_loading_the_demo_gives_an_equal_config(tmp_path) -> None:
    config = load_config(DEMO)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_overrides_replace_values_of_the_file(tmp_path) -> None:
    config = load_config(
        DEMO, ["learner.optimizer.lr=0.5", "run.dir=elsewhere", "curriculum.max_new_tokens={start: 9}"]
    )
    assert config.learner.optimizer.lr == 0.5
    assert config.run.dir == "elsewhere"
    assert config.curriculum.max_new_tokens is not None
    assert config.curriculum.max_new_tokens.start == 9
    for wrong, message in [
        ("run.dir", "expected section.field=value"),
        ("run.dir.x=1", "dir is a value, not a section"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(DEMO, [wrong])


def test_files_that_are_no_run_files_are_named(tmp_path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [unclosed")
    not_a_mapping = tmp_path / "list.yaml"
    not_a_mapping.write_text("- 1")
    missing = tmp_path / "no.yaml"
    for file, message in [(missing, "does not exist"), (broken, "is not YAML"), (not_a_mapping, "holds a list")]:
        with pytest.raises(ConfigError, match=message):
            load_config(file)


def test_every_field_is_documented() -> None:
    def undocumented(model: type[BaseModel]) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found += undocumented(field.annotation)
            elif not field.description:
                found.append(f"{model.__name__}.{name}")
        return found

    assert undocumented(OpdlmConfig) == []


def test_strategies_and_selections_of_the_schema_are_those_of_the_code() -> None:
    assert set(get_args(Strategy)) == {*STRATEGIES, "verified"}
    assert set(get_args(Selection)) == {*SELECTIONS, "drafts"}


RECIPES = [*DEMO.parent.glob("qwen3-*.yaml"), *DEMO.parent.glob("math-*.yaml")]


@pytest.mark.parametrize("file", run_files(), ids=lambda f: f.name)
def test_every_run_file_is_valid(file) -> None:
    load_config(file)


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.name)
def test_the_recipes_have_the_values_of_the_paper(file) -> None:
    """METHOD.md section 6: the values that all runs of the paper share."""
    config = load_config(file)
    optimizer, rollout, objective = config.learner.optimizer, config.rollout, config.objective
    assert (rollout.prompts_per_round, config.learner.batch_size, rollout.block_size) == (128, 8, 4)
    assert (optimizer.lr, optimizer.lr * optimizer.min_lr_ratio) == (1e-5, pytest.approx(1e-6))
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.betas) == ("cosine", 5, (0.9, 0.999))
    assert (optimizer.weight_decay, optimizer.grad_clip, config.model.dtype) == (0.0, 1.0, "bfloat16")
    assert (rollout.strategy, rollout.threshold, rollout.temperature) == ("low_confidence_dynamic", 0.9, 1.0)
    assert (objective.kind, objective.resolved_selection, objective.divergence) == ("opd", "one_state_per_block", "kl")
    assert objective.exclude_eos
    large = "4b" in file.name or "8b" in file.name
    assert objective.top_k == (16 if large else 0)
    length = config.curriculum.max_new_tokens
    assert length is not None
    end = 8000 if file.name == "math-thinking.yaml" else 2000 if file.name.startswith("math") else 4000
    assert (length.kind, length.start, length.end, length.rounds) == ("linear", 100, end, 10)
    assert config.data.epochs == (10 if file.name.startswith("math") else 1)
