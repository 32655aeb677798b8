"""The command line as a user sees it: commands that work, and the one-line errors for mistakes.

`pytest tests/deploy/cli/test_cli.py`
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from opdlm import __version__
from opdlm.common.model.facts import read_facts
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.cli import app
from tests.tiny import save_teacher

runner = CliRunner()


def opdlm(*arguments: object, code: int = 0) -> str:
    """Runs the command line; returns its output with every line break and run of spaces as one space."""
    result = runner.invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    text = " ".join(result.output.split())
    assert result.exit_code == code, f"exit code {result.exit_code}: {text} {result.exception!r}"
    return text


@pytest.fixture
def run_file(chain_teacher, tmp_path) -> Path:
    file = tmp_path / "run.yaml"
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"teacher": str(chain_teacher), "dtype": "float32"},
        "data": {"task": "chain", "prompts": 100},
        "rollout": {"max_new_tokens": 20},
        "teacher": {"dtype": "float32"},
    }
    file.write_text(yaml.safe_dump(config))
    return file


COMMANDS = [
    "train",
    "compare",
    "pretrain",
    "convert",
    "export",
    "generate",
    "eval",
    "sweep",
    "lm-eval",
    "trace",
    "plan",
    "recipes",
    "curves",
    "prompts",
    "scale",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command) -> None:
    text = opdlm(command, "--help")
    assert f"opdlm {command} " in text
    assert "Example" in text


def test_the_version_is_shown() -> None:
    assert opdlm("--version") == f"opdlm {__version__}"


def test_recipes_are_listed_and_printed() -> None:
    assert "one-gpu All roles on one GPU" in opdlm("recipes")
    assert opdlm("recipes", "demo").startswith("# The whole loop on two cores")


def test_a_bundled_run_file_is_found_in_any_folder(chain_teacher, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "deploy/demo.yaml"):
        assert "plan of runs/demo " in opdlm("plan", name, "--set", f"model.teacher={chain_teacher}")


def test_dry_run_prints_the_plan_and_writes_nothing(run_file, tmp_path) -> None:
    text = opdlm("train", run_file, "--dry-run", "--set", "data.epochs=2", "--set", "queue.max_staleness=2")
    assert "200 in 2 rounds of 128" in text
    assert "25 of 8 trajectories" in text
    assert "at most 2 rounds" in text
    assert "rollout 1 1 0 1 0" in text
    assert "sum 3 0" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rollout.block_sise=4"], "rollout.block_sise: unknown key; did you mean `block_size`?"),
        (["rollout.block_size=0"], "rollout.block_size: input should be greater than or equal to 1; found 0"),
        (["rollout.batch_size=many"], "rollout.batch_size: input should be a valid integer"),
        (["model.teacher=/no/such/folder"], "model folder /no/such/folder does not exist"),
        (["rollout.max_new_tokens=500"], "rollout.max_new_tokens: found 500"),
        (["rollout.max_new_tokens=500"], "the model's context of 128 tokens leaves no room for a prompt"),
        (["data.task=chian"], "task: found 'chian'; known tasks: add, chain"),
        (["data.task=null", "data.path=/no/prompts.jsonl"], "data.path: /no/prompts.jsonl does not exist"),
        (["data.max_prompt_tokens=2"], "no prompt to train on in chain; first refusal: chain/0:"),
        (["teacher.targets=topk", "teacher.top_k=99", "objective.top_k=9"], "teacher.top_k: found 99, more than"),
        (["rollout.block_size"], "--set rollout.block_size: expected section.field=value"),
    ],
)
def test_mistakes_are_named_before_anything_starts(run_file, tmp_path, settings, message) -> None:
    overrides = [part for setting in settings for part in ("--set", setting)]
    assert message in opdlm("train", run_file, *overrides, code=2)
    assert not (tmp_path / "run").exists()


def test_missing_run_file_and_empty_data(run_file, tmp_path) -> None:
    assert "does not exist; give a YAML file, or the name of a bundled one" in opdlm(
        "train", tmp_path / "no.yaml", code=2
    )
    (tmp_path / "empty.jsonl").touch()
    text = opdlm("train", run_file, "--set", "data.task=null", "--set", f"data.path={tmp_path}/empty.jsonl", code=2)
    assert "data: found no prompt to train on in" in text


def test_given_students_are_checked(run_file, chain_teacher, tmp_path) -> None:
    text = opdlm("train", run_file, "--set", f"model.student={chain_teacher}", code=2)
    assert f"model.student: {chain_teacher} has no mask token; convert it first (opdlm convert {chain_teacher}" in text
    assert "DST --block-size 4 --block-grid absolute) and set model.student to DST" in text
    opdlm("convert", chain_teacher, tmp_path / "eight", "--block-size", 8)
    text = opdlm("train", run_file, "--set", f"model.student={tmp_path}/eight", code=2)
    assert "rollout.block_size: found 4, but the student" in text


def test_students_of_other_teachers(run_file, tmp_path) -> None:
    """A student may have another size, but no other token strings and no responses beyond the teacher's context."""
    for name, how in {
        "wide": {"hidden_size": 24},
        "other": {"alphabet": "0123456789*-=;"},
        "long": {"context": 256},
    }.items():
        opdlm("convert", save_teacher(tmp_path / name, **how), tmp_path / f"{name}-student")

    def with_student(name: str, *more: str, code: int) -> str:
        settings = [f"model.student={tmp_path}/{name}-student", *more]
        return opdlm("train", run_file, "--dry-run", *(p for s in settings for p in ("--set", s)), code=code)

    assert "nothing was started" in with_student("wide", code=0)
    text = with_student("other", code=2)
    assert "vocabulary mismatch: the tokenizers give 1 ids another string, first id 3: '+' for the teacher" in text
    assert "'*' for the student" in text
    assert "context of 128 tokens leaves no room" in with_student("long", "rollout.max_new_tokens=130", code=2)


def test_a_missing_package_is_named_with_its_extra(run_file, chain_teacher, tmp_path, monkeypatch) -> None:
    installed = {"vllm": None, "accelerate": None, "nixl": None, "peft": None, "wandb": None}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: installed.get(n, find_spec(n, *a)))

    def dry_run(*settings: str, code: int = 2) -> str:
        return opdlm("train", run_file, "--dry-run", *(p for s in settings for p in ("--set", s)), code=code)

    vllm = ("teacher.backend=vllm", "teacher.targets=topk", "teacher.top_k=8", "objective.top_k=8")
    message = "teacher.backend: found `vllm`, which needs the package vllm; pip install 'opdlm-ray[vllm]'"
    assert message in dry_run(*vllm)
    assert "needs the package accelerate" in dry_run("teacher.device_map=auto")
    assert "needs the package nixl; pip install 'opdlm-ray[nixl]'" in dry_run("rollout.weight_transport=nixl")
    assert "needs the package peft; pip install 'opdlm-ray[lora]'" in dry_run("model.lora={}")
    message = "run.wandb_project: found `p`, which needs the package wandb; pip install 'opdlm-ray[wandb]'"
    assert message in dry_run("run.wandb_project=p")
    installed["vllm"] = installed["peft"] = find_spec("json")
    for wrong in ("v_porj", "lm_head"):
        message = f"model.lora.target_modules: found {wrong}; the student's layers have down_proj, gate_proj, k_proj"
        assert message in dry_run(f"model.lora={{target_modules: [q_proj, {wrong}]}}")
    assert "nothing was started" in dry_run("model.lora={target_modules: [q_proj]}", code=0)
    assert "nothing was started" in dry_run(*vllm, code=0)
    opdlm("convert", chain_teacher, tmp_path / "plain")
    opdlm("export", tmp_path / "plain", tmp_path / "a2d", "--layout", "a2d-qwen3")
    text = dry_run(*vllm, f"model.teacher={tmp_path}/a2d")
    assert "teacher.backend: found `vllm`, which cannot load model_type `a2d-qwen3`" in text


def test_teacher_without_tokenizer(run_file, chain_teacher, tmp_path) -> None:
    shutil.copytree(chain_teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    text = opdlm("train", run_file, "--set", f"model.teacher={tmp_path}/bare", code=2)
    assert "has no tokenizer.json; expected a tokenizer beside the weights" in text


def test_pretrain_convert_generate_eval(tmp_path) -> None:
    """A small model from random weights to generated text."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    size = ("--hidden-size", 16, "--layers", 1, "--heads", 2, "--steps", 3, "--batch-size", 4)
    assert "exact match on 500 held-out problems: 0.0%" in opdlm("pretrain", teacher, "--task", "chain", *size)
    assert "exists; give a new folder" in opdlm("pretrain", teacher, "--task", "chain", code=2)
    assert "mask token id 17, block size 4, absolute grid" in opdlm("convert", teacher, student)
    assert read_facts(student).is_student

    text = opdlm("export", student, tmp_path / "sdar", "--layout", "sdar")
    assert "warning: the mask token id is 17, but SGLang and LMDeploy use 151669" in text
    assert "sdar: sdar layout" in text
    assert "exists; give a new folder" in opdlm("export", student, tmp_path / "sdar", "--layout", "qwen3", code=2)
    assert "is a qwen3; it can be:" in opdlm("export", student, tmp_path / "new", "--layout", "llama", code=2)

    assert "autoregressive, greedy" in opdlm("eval", teacher, "--task", "chain", "--problems", 10)
    text = opdlm("eval", student, "--task", "chain", "--problems", 10, "--strategy", "sequential")
    assert "sequential" in text
    assert "known: low_confidence_static" in opdlm("eval", student, "--task", "chain", "--strategy", "best", code=2)

    assert "1+2=" in opdlm("generate", teacher, "--prompt", "1+2=", "--max-new-tokens", 8)
    traced = opdlm("generate", student, "-p", "1+2=", "-p", "30-4=", "--max-new-tokens", 8, "--trace")
    assert "positions 4 to 7" in traced
    assert traced.count("%") > 8
    drawn = {opdlm("generate", teacher, "-p", "1+2=", "--temperature", 1, "--seed", seed) for seed in range(4)}
    assert len(drawn) > 1, "an AR checkpoint samples too"
    assert "it samples from the whole vocabulary" in opdlm("generate", teacher, "-p", "1+2=", "--top-k", 3, code=2)
    assert "chat template" in opdlm("generate", student, "-p", "1+2=", "--chat", code=2)
    assert "thinking: found without chat" in opdlm("generate", student, "-p", "1+2=", "--thinking", code=2)
    assert "there are no blocks to show" in opdlm("generate", teacher, "-p", "1+2=", "--trace", code=2)
    assert "200 prompt tokens and at most 64 new ones take 264 positions" in opdlm(
        "generate", student, "-p", "1" * 200, code=2
    )


def test_pretrain_on_a_text_file(tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be\n" * 20)
    size = ("--hidden-size", 16, "--layers", 1, "--heads", 2, "--steps", 3, "--batch-size", 2, "--context", 32)
    opdlm("pretrain", tmp_path / "poet", "--text", text, *size)
    assert load_tokenizer(tmp_path / "poet").decode(load_tokenizer(tmp_path / "poet")("be,\n")["input_ids"]) == "be,\n"
    for arguments, message in [
        ((), "give exactly one of --task"),
        (("--task", "chain", "--text", text), "give exactly one of --task"),
        (("--text", tmp_path / "no.txt"), "does not exist"),
        (("--text", text, "--context", 4000), "has 400 characters; more than --context 4000 are needed"),
        (("--task", "chain", "--hidden-size", 10), "--hidden-size 10 is not a multiple of --heads 4"),
    ]:
        assert message in opdlm("pretrain", tmp_path / "new", *arguments, code=2)
    assert not (tmp_path / "new").exists()


def test_convert_refuses_to_overwrite(chain_teacher, tmp_path) -> None:
    (tmp_path / "there").mkdir()
    assert "exists; give a new folder" in opdlm("convert", chain_teacher, tmp_path / "there", code=2)
    assert "does not exist; expected a checkpoint" in opdlm("convert", tmp_path / "no", tmp_path / "dst", code=2)
    broken = tmp_path / "broken"
    shutil.copytree(chain_teacher, broken)
    (broken / "config.json").write_text("{")
    assert "is not JSON" in opdlm("convert", broken, tmp_path / "dst", code=2)
    assert not (tmp_path / "dst").exists()
    assert json.loads((chain_teacher / "config.json").read_text())["model_type"] == "qwen3"


def test_one_tokenizer_with_other_padding_is_one_vocabulary(run_file, tmp_path) -> None:
    teacher = save_teacher(tmp_path / "padded", spare_rows=16)
    opdlm("convert", save_teacher(tmp_path / "small", spare_rows=8), student := tmp_path / "student")
    settings = ("--set", f"model.teacher={teacher}", "--set", f"model.student={student}", "--dry-run")
    opdlm("train", run_file, *settings)
    topk = ("--set", "teacher.targets=topk", "--set", "objective.top_k=4")
    for targets, top_k in ((topk, "teacher.top_k"), ((), "objective.top_k")):
        text = opdlm("train", run_file, *settings, *targets, "--set", f"{top_k}=18", code=2)
        assert f"{top_k}: found 18, more than the teacher's 17 tokens" in text
        opdlm("train", run_file, *settings, *targets, "--set", f"{top_k}=17")


def test_a_run_that_converts_takes_another_mask_token(run_file, tmp_path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    file = teacher / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mask_token": "<|endoftext|>"}))
    settings = ("--set", f"model.teacher={teacher}", "--dry-run")
    text = opdlm("train", run_file, *settings, code=2)
    assert "'<|endoftext|>' (id 1), which is an end-of-sequence token" in text
    opdlm("train", run_file, *settings, "--set", "model.mask_token='<m>'")
    opdlm("convert", teacher, student := tmp_path / "student", "--mask-token", "<m>")
    both = ("--set", "model.mask_token='<m>'", "--set", f"model.student={student}")
    assert "model.mask_token: found '<m>', but model.student" in opdlm("train", run_file, *settings, *both, code=2)
