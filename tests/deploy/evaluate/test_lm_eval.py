"""The real lm-eval with our decoders, on a local task. `pytest tests/deploy/evaluate/test_lm_eval.py`"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.types import RolloutRequest
from opdlm.deploy.evaluate.actor_decoder import ActorDecoder
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.lm_eval_model import OpdlmLM
from tests.deploy.cli.test_cli import opdlm

PROMPTS = ["1+2=", "30-4+5=", "7+7=", "12-3=", "59-9-9=", "0+1+2="]
LIMIT = 12


@pytest.fixture(scope="module")
def student(chain_teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval") / "student"
    convert_checkpoint(chain_teacher, folder, 4, "absolute")
    return folder


def asked(contexts: list[str], **gen_kwargs: object) -> list[Instance]:
    """Requests as lm-eval builds them from documents."""
    return [
        Instance("generate_until", {}, (context, dict(gen_kwargs)), i, metadata=("chain_local", i, 1))
        for i, context in enumerate(contexts)
    ]


def direct(folder: Path, limit: int = LIMIT, **settings: object) -> list[str]:
    """The responses to PROMPTS, decoded without lm-eval and not cut at stop strings."""
    decoder = CheckpointDecoder(folder)
    requests = [_request(decoder, i, limit) for i in range(len(PROMPTS))]
    answers = decoder.answer(requests, replace(decoder.base, **settings), 4)
    assert [len(r) <= limit for r in answers.responses] == [True] * len(PROMPTS)
    return [decoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers.responses]


def _request(decoder: CheckpointDecoder, i: int, limit: int) -> RolloutRequest:
    return RolloutRequest(i, str(i), decoder.encode(PROMPTS[i]), limit, seed=i)


def test_generate_until_gives_what_direct_decoding_gives_with_the_same_settings(student) -> None:
    model = get_model("opdlm").create_from_arg_string(
        f"pretrained={student},strategy=low_confidence_dynamic,threshold=0.3,block_size=8,batch_size=4",
        {"batch_size": 1, "device": "cuda:0", "max_batch_size": None},  # lm-eval's own command always passes these
    )
    assert (type(model), model.batch_size, model.max_new_tokens) == (OpdlmLM, 4, 256)
    texts = model.generate_until(asked(PROMPTS, until=[], max_gen_toks=LIMIT), disable_tqdm=True)
    assert texts == direct(student, strategy="low_confidence_dynamic", threshold=0.3, block_size=8)
    assert texts != direct(student, strategy="low_confidence_static", block_size=4)
    info, settings = model.get_model_info(), replace(model.decoder.base, threshold=0.3)
    again = model.decoder.answer([_request(model.decoder, i, LIMIT) for i in range(len(PROMPTS))], settings, 4)
    assert (info["tokens_per_step"], info["block_size"], info["threshold"]) == (again.tokens_per_step, 8, 0.3)


def test_each_request_keeps_its_own_limit_and_stop_strings(student) -> None:
    model = OpdlmLM(str(student), "sequential", max_new_tokens=7)
    whole = direct(student, strategy="sequential")
    stop = whole[0][3:5]
    first = asked(PROMPTS[:1], until=[stop, "never"], max_gen_toks=LIMIT)
    rest = asked(PROMPTS[1:])  # the task sets neither, so the model's own limit holds
    texts = model.generate_until([*first, *rest], disable_tqdm=True)
    assert texts[0] == whole[0].split(stop)[0] != whole[0]
    assert texts[1:] == direct(student, 7, strategy="sequential")[1:]
    before = model._tokens
    model.generate_until(first, disable_tqdm=True)
    assert model._tokens - before < LIMIT, "the stop string ends decoding"


def test_a_stop_string_that_is_a_special_token_stops_too(student) -> None:
    model = OpdlmLM(str(student))
    tokenizer = model.decoder.tokenizer
    ids = np.array([*tokenizer("1+2")["input_ids"], tokenizer.pad_token_id, *tokenizer("9")["input_ids"]])
    assert model._text(ids, []) == "1+29"
    assert model._text(ids, [tokenizer.pad_token]) == "1+2"


def test_sampling_and_unsupported_options(student, chain_teacher) -> None:
    model = OpdlmLM(str(student))
    sampled = asked(PROMPTS, do_sample=True, temperature=1.0, top_k=3, max_gen_toks=LIMIT)
    texts = model.generate_until(sampled, disable_tqdm=True)
    assert texts == direct(student, temperature=1.0, top_k=3)
    assert texts != model.generate_until(asked(PROMPTS, max_gen_toks=LIMIT), disable_tqdm=True)
    with pytest.raises(OpdlmError, match="gen_kwargs: repetition_penalty: not supported; known: until"):
        model.generate_until(asked(PROMPTS, repetition_penalty=1.2), disable_tqdm=True)
    with pytest.raises(OpdlmError, match="is autoregressive; it samples without top_k and top_p"):
        OpdlmLM(str(chain_teacher)).generate_until(sampled, disable_tqdm=True)
    with pytest.raises(OpdlmError, match=r"chain_local document 0: 4 prompt tokens and at most 500 new ones take"):
        model.generate_until(asked(PROMPTS, max_gen_toks=500), disable_tqdm=True)


def test_autoregressive_checkpoints_answer_token_by_token(chain_teacher) -> None:
    model = OpdlmLM(str(chain_teacher), batch_size=2)
    texts = model.generate_until(asked(PROMPTS, max_gen_toks=LIMIT), disable_tqdm=True)
    assert texts == direct(chain_teacher)
    assert model.get_model_info()["tokens_per_step"] == 1
    assert model.get_model_info()["decoding"] == "autoregressive"


def test_mistakes_in_model_args_are_named(student) -> None:
    for arguments, message in [
        ({"blok_size": 4}, "model_args: blok_size: unknown; did you mean `block_size`?"),
        ({"strategy": "best"}, "model_args: strategy: found 'best'; known: low_confidence_static"),
        ({"threshold": 2}, "model_args: threshold: found 2; expected a number within 0 and 1"),
        ({"batch_size": "auto"}, "model_args: batch_size: found 'auto'; expected a whole number from 1"),
        ({"chat_template": "/no/such.jinja"}, "chat_template: /no/such.jinja does not exist"),
        ({"pretrained": None}, "model_args: pretrained: missing"),
    ]:
        with pytest.raises(OpdlmError, match=message.replace("?", r"\?")):
            OpdlmLM(**{"pretrained": str(student), **arguments})


def test_chat_templates(student, tmp_path) -> None:
    history = [{"role": "user", "content": "1+2="}]
    plain = OpdlmLM(str(student))
    with pytest.raises(OpdlmError, match="chat template: "):
        plain.apply_chat_template(history)
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% if not loop.last or add_generation_prompt %};"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}a{% if enable_thinking is false %}-{% endif %}{% endif %}"
    )
    model = OpdlmLM(str(student), chat_template=str(file), enable_thinking=False)
    assert model.chat_template(True) == file.read_text()
    assert model.chat_template(False) is None
    assert model.apply_chat_template(history) == "u1+2=;a-"
    begun = [*history, {"role": "assistant", "content": "1+"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == "u1+2=;a1+"
    name = model.tokenizer_name
    assert name.startswith(f"{student.name}-")
    assert name == model.tokenizer_name
    model.decoder.tokenizer.chat_template = f"{model.decoder.tokenizer.chat_template} "
    assert name != model.tokenizer_name, "lm-eval would take the requests of another template from its cache"


# --- the harness as a whole ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_folder(student, tmp_path_factory) -> Path:
    """A local lm-eval task of PROMPTS. Two of six references are what the student answers, the others are not."""
    folder = tmp_path_factory.mktemp("tasks")
    answers = direct(student, strategy="low_confidence_dynamic")
    rows = [{"q": p, "a": a if i < 2 else f"{a}!"} for i, (p, a) in enumerate(zip(PROMPTS, answers, strict=True))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "chain_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["never"], "max_gen_toks": LIMIT, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "chain_local.yaml").write_text(yaml.safe_dump(task))
    (folder / "chain_code.yaml").write_text(yaml.safe_dump(task | {"task": "chain_code", "unsafe_code": True}))
    likelihood = task | {"task": "chain_choice", "output_type": "multiple_choice", "doc_to_choice": ["1", "2"]}
    likelihood |= {"doc_to_target": 0, "metric_list": [{"metric": "acc"}]}
    (folder / "chain_choice.yaml").write_text(yaml.safe_dump({k: v for k, v in likelihood.items() if k[:3] != "gen"}))
    return folder


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module", autouse=True)
def one_task_index() -> Iterator[None]:
    """Shares one `TaskManager` per folder: each one reads lm-eval's 14,000 task files, which takes about 9 s."""
    made: dict[str, TaskManager] = {}

    def shared(include_path: str | None = None, **others: object) -> TaskManager:
        if any(others.values()):
            return TaskManager(include_path=include_path, **others)
        return made.setdefault(str(include_path), made.get(str(include_path)) or TaskManager(include_path=include_path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", shared)
        yield


def test_eval_runs_the_harness(student, task_folder, tmp_path) -> None:
    file = tmp_path / "results.json"
    local = ("--lm-eval", "chain_local", "--include-path", task_folder)
    text = opdlm("eval", student, *local, "--output", file)
    assert "task metric value stderr shots" in text
    assert "chain_local exact_match 0.3333" in text
    assert "dynamic 0.9: " in text
    results = json.loads(file.read_text())["low_confidence_dynamic"]
    assert results["results"]["chain_local"]["exact_match,none"] == pytest.approx(2 / 6)
    assert results["config"]["pretrained"] == str(student)
    answers = [sample["resps"][0][0] for sample in results["samples"]["chain_local"]]
    assert answers == direct(student, strategy="low_confidence_dynamic")
    opdlm("eval", student, *local, "--limit", 2, "--output", file)
    assert json.loads(file.read_text())["low_confidence_dynamic"]["results"]["chain_local"]["exact_match,none"] == 1.0


def test_multiple_choice_with_a_bound(student, task_folder, tmp_path) -> None:
    file = tmp_path / "results.json"
    choice = ("--lm-eval", "chain_choice", "--include-path", task_folder, "--output", file)
    text = opdlm("eval", student, *choice, "--likelihood", "bound", "--likelihood-samples", 4)
    assert "chain_choice acc" in text
    assert "in place of likelihoods: a lower bound (4 samples each, mean standard error" in text
    assert json.loads(file.read_text())["low_confidence_dynamic"]["config"]["likelihood"] == "lower bound"


def test_lm_evals_own_command_knows_the_model(student, task_folder, tmp_path) -> None:
    arguments = f"pretrained={student},batch_size=4"
    options = ("--tasks", "chain_local", "--include_path", task_folder, "--output_path", tmp_path / "out.json")
    before = list(sys.argv)
    opdlm("lm-eval", "run", "--model", "opdlm", "--model_args", arguments, *options)
    assert sys.argv == before
    (file,) = tmp_path.glob("out*.json")
    written = json.loads(file.read_text())
    assert written["results"]["chain_local"]["exact_match,none"] == pytest.approx(2 / 6)
    assert written["config"]["block_size"] == 4


def test_mistakes_are_named_before_anything_is_decoded(student, task_folder, monkeypatch) -> None:
    local = ("--include-path", task_folder)
    monkeypatch.setattr("opdlm.deploy.evaluate.lm_eval.open_decoder", lambda *_: pytest.fail("a model was loaded"))
    for arguments, message in [
        (("--lm-eval", "chain_lokal", *local), "unknown task 'chain_lokal'; did you mean `chain_local`?"),
        (("--lm-eval", "chain_code", *local), "task 'chain_code' runs the code that the model writes; where that may"),
        (("--lm-eval", "chain_choice", *local), "task 'chain_choice': lm-eval asks for multiple_choice, but a block-"),
        (("--lm-eval", "chain_choice", *local, "--likelihood", "exact"), "--likelihood: found 'exact'; known: bound"),
        (("--lm-eval", "chain_choice", *local, "--likelihood-samples", 9), "--likelihood-samples: found 9 without"),
        (("--task", "chain", "--likelihood", "bound"), "--likelihood: found bound; it does not go with --task"),
        (("--lm-eval", "x", "--include-path", "/no/such"), "--include-path: /no/such is no folder"),
        (("--lm-eval", "x", "--task", "chain"), "--task: found chain; it does not go with --lm-eval"),
        (("--lm-eval", "x", "--output", "/no/such/f.json"), "--output: /no/such/f.json lies in /no/such, which does"),
        (("--task", "chain", "--limit", 3), "--limit: found 3.0; it does not go with --task and --data"),
    ]:
        assert message in opdlm("eval", student, *arguments, code=2)


def test_without_the_package_the_error_names_the_extra(student, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'opdlm-ray[eval]'" in opdlm("eval", student, "--lm-eval", "gsm8k", code=2)
    assert "pip install 'opdlm-ray[eval]'" in opdlm("lm-eval", "run", code=2)


@pytest.mark.ray
def test_actors_give_what_one_process_gives(ray_cluster, student, chain_teacher, task_folder, tmp_path) -> None:
    """lm-eval runs on two rollout actors; an AR checkpoint answers on a teacher actor."""
    file = tmp_path / "results.json"
    local = ("--lm-eval", "chain_local", "--include-path", task_folder, "--batch-size", 2)
    text = opdlm("eval", student, *local, "--actors", 2, "--output", file)
    assert "tokens per denoising step" in text
    samples = json.loads(file.read_text())["low_confidence_dynamic"]["samples"]["chain_local"]
    assert [s["resps"][0][0] for s in samples] == direct(student, strategy="low_confidence_dynamic")
    with ActorDecoder(chain_teacher, actors=1) as decoder:
        model = OpdlmLM(decoder, batch_size=2)
        texts = model.generate_until(asked(PROMPTS, max_gen_toks=LIMIT), disable_tqdm=True)
        assert texts == direct(chain_teacher)
    with pytest.raises(OpdlmError, match=r"--actors: the run asks for 99 CPUs .--actors 99 x 1., the cluster has 8"):
        ActorDecoder(student, actors=99)
