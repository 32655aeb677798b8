"""Beginning and end tokens: the same in data, generate, eval, lm-eval, traces and the plan.

`pytest tests/deploy/evaluate/test_special_tokens.py`
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import yaml

import opdlm as api
from opdlm.common.config.schema import DataConfig
from opdlm.common.data.prompts import load_prompts
from opdlm.common.data.tasks import get_task
from opdlm.common.export import export
from opdlm.common.grid import BlockGrid
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.held_out import HeldOutProblems
from opdlm.deploy.evaluate.lm_eval_model import OpdlmLM
from opdlm.deploy.evaluate.options import QuestionOptions
from opdlm.deploy.evaluate.questions import open_questions
from opdlm.deploy.run.sources import given_trajectory
from tests.common.model.test_end_tokens import set_keys
from tests.common.model.test_prompt_encoder import BOS, with_post_processor
from tests.deploy.cli.test_cli import opdlm
from tests.deploy.evaluate.test_lm_eval import asked
from tests.tiny import save_teacher

PLUS = 3
"""The token that generation_config.json names beside the tokenizer's."""
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


@pytest.fixture
def ends(tmp_path) -> Path:
    folder = save_teacher(tmp_path / "ends")
    set_keys(folder / "generation_config.json", eos_token_id=PLUS)
    return folder


@pytest.fixture
def begins(tmp_path) -> Path:
    folder = with_post_processor(tmp_path / "begins", "<s> $A [SEP]")
    set_keys(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


def jsonl(file: Path, *rows: dict) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- end tokens ---------------------------------------------------------------------------------------------------


def test_answers_are_marked_up_to_any_end_token(ends, tmp_path) -> None:
    decoder = CheckpointDecoder(ends)
    tokenizer = decoder.tokenizer
    held_out = open_questions(QuestionOptions("chain", problems=6), decoder)
    problems = HeldOutProblems([get_task("chain")], tokenizer, 6).problems
    solutions = [tokenizer(problem.solution, add_special_tokens=False)["input_ids"] for _, problem in problems]
    for end, right in ((PLUS, 1.0), (tokenizer.eos_token_id, 1.0), (5, 0.0)):
        assert held_out.mark([np.array([*ids, end]) for ids in solutions]).right == right
    data = jsonl(tmp_path / "d.jsonl", {"prompt": "6-1=", "answer": "5"})
    rows = open_questions(QuestionOptions(None, data), decoder)
    five = tokenizer("5", add_special_tokens=False)["input_ids"]
    assert rows.mark([np.array([*five, PLUS])]).right == 1.0
    assert rows.mark([np.array([*five, PLUS, *five])]).right == 1.0, "nothing counts behind an end token"
    assert OpdlmLM(decoder)._text(np.array([*five, PLUS]), ["never"]) == "5"


@pytest.mark.parametrize("converted", [False, True])
def test_generate_ends_at_any_end_token_and_does_not_print_it(ends, tmp_path, converted) -> None:
    """The decoder's own choice of tokens: the first token that it draws becomes an end token of the folder."""
    folder = tmp_path / "student" if converted else ends
    if converted:
        convert_checkpoint(ends, folder, 4, "response")
    before = api.load(folder).generate(["1-1="], max_new_tokens=8, strategy="sequential")[0]
    drawn = int(before.ids[1])
    set_keys(folder / "generation_config.json", eos_token_id=[PLUS, drawn])
    (after,) = api.load(folder).generate(["1-1="], max_new_tokens=8, strategy="sequential")
    length = list(before.ids).index(drawn) + 1
    assert after.ids.tolist() == before.ids[:length].tolist()
    assert load_tokenizer(folder).decode([drawn]) not in after.text


def test_given_responses_end_at_any_end_token(ends, tmp_path) -> None:
    tokenizer, facts = load_tokenizer(ends), read_facts(ends)
    given = [[5, 6], [5, PLUS], [5, 1], [5, PLUS, 6]]
    file = jsonl(tmp_path / "d.jsonl", *({"prompt": "1=", "response": ids} for ids in given))
    data = DataConfig(path=str(file), response_field="response")
    prompts = load_prompts(data, tokenizer, 99, 0, facts.tokens, facts.eos_ids).prompts
    expected = [[5, 6, 1], [5, PLUS], [5, 1], [5, PLUS, 6, 1]]
    assert [p.response.tolist() for p in prompts if p.response is not None] == expected
    for prompt, response in zip(prompts, ([5, 6, 1], [5, PLUS], [5, 1], [5, PLUS]), strict=True):
        assert prompt.response is not None
        grid = BlockGrid(4, "response")
        made = given_trajectory(0, "x", prompt.ids, prompt.response, 64, facts.eos_ids, grid, 0)
        assert (made.response.tolist(), made.finish_reason) == (response, "eos")


def test_a_disagreement_is_told_once(ends, tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING)

    def told(*command: object) -> int:
        caplog.clear()
        text = opdlm(*command) + caplog.text
        return text.count("a response ends at any of them")

    run = tmp_path / "run.yaml"
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"teacher": str(ends)},
        "data": {"task": "chain", "prompts": 8},
    }
    run.write_text(yaml.safe_dump(settings | {"rollout": {"max_new_tokens": 8}}))
    student = tmp_path / "student"
    assert told("train", run, "--dry-run") == told("plan", run) == 1
    assert told("generate", ends, "-p", "1+1=", "--max-new-tokens", 2) == 1
    assert told("eval", ends, "--task", "chain", "--problems", 2, "--max-new-tokens", 2) == 1
    assert told("convert", ends, student) == 1
    assert told("generate", student, "-p", "1+1=", "--max-new-tokens", 2) == 0
    assert told("train", run, "--dry-run", "--set", f"model.student={student}") == 1, "of the teacher's files"


def test_a_student_with_other_end_tokens_than_its_teacher(ends, tmp_path) -> None:
    convert_checkpoint(save_teacher(tmp_path / "plain"), tmp_path / "student", 4, "absolute")
    run = tmp_path / "run.yaml"
    model = {"teacher": str(ends), "student": str(tmp_path / "student")}
    run.write_text(
        yaml.safe_dump({"model": model, "data": {"task": "chain", "prompts": 8}, "rollout": {"max_new_tokens": 8}})
    )
    text = opdlm("plan", run)
    assert f"end tokens: the teacher {ends} has" in text
    assert "and the run takes the student's" in text
    opdlm("plan", run, "--json", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["run"]["end tokens"].endswith(" (1)")


@pytest.mark.parametrize("command", ["generate", "eval", "convert", "plan"])
def test_impossible_end_tokens_are_one_line_for_every_command(ends, tmp_path, command) -> None:
    set_keys(ends / "generation_config.json", eos_token_id="1")
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"model": {"teacher": str(ends)}, "data": {"task": "chain", "prompts": 8}}))
    arguments = {
        "generate": (ends, "-p", "1="),
        "eval": (ends, "--task", "chain"),
        "convert": (ends, tmp_path / "new"),
        "plan": (run,),
    }
    text = opdlm(command, *arguments[command], code=2)
    assert text == (
        f"opdlm: {ends}/generation_config.json: eos_token_id: found '1'; expected a token id from 0 to 16, or a list "
        "of them"
    )


# --- beginning tokens ---------------------------------------------------------------------------------------------


def test_every_text_prompt_begins_alike(begins, tmp_path) -> None:
    tokenizer = load_tokenizer(begins)
    expected = tokenizer("1+1=")["input_ids"][:-1]
    assert expected[0] == BOS
    file = jsonl(tmp_path / "d.jsonl", {"prompt": "1+1=", "answer": "2", "response": "2"})
    decoder, vocabulary = CheckpointDecoder(begins), read_facts(begins).tokens
    data = DataConfig(path=str(file), response_field="response")
    (prompt,) = load_prompts(data, tokenizer, 99, 0, vocabulary).prompts
    (question,) = open_questions(QuestionOptions(None, file), decoder).requests(4)
    assert prompt.ids.tolist() == question.prompt_ids.tolist() == decoder.encode("1+1=").tolist() == expected
    assert prompt.response is not None
    assert BOS not in prompt.response
    held_out = open_questions(QuestionOptions("chain", problems=3), decoder).requests(4)
    made = load_prompts(DataConfig(task="chain", prompts=3), tokenizer, 99, 0, vocabulary).prompts
    assert {ids[0] for ids in [r.prompt_ids for r in held_out] + [p.ids for p in made]} == {BOS}
    ids = jsonl(tmp_path / "ids.jsonl", {"prompt": [6, 3, 6]})
    (given,) = load_prompts(DataConfig(path=str(ids)), tokenizer, 99, 0, vocabulary).prompts
    assert given.ids.tolist() == [6, 3, 6], "token ids stay as they are"


def test_chat_text_has_what_its_template_writes(begins, tmp_path) -> None:
    tokenizer, decoder = load_tokenizer(begins), CheckpointDecoder(begins)
    once = [BOS, *tokenizer("1+1=", add_special_tokens=False)["input_ids"]]
    file = jsonl(tmp_path / "d.jsonl", {"prompt": "1+1", "answer": "2"})
    (prompt,) = load_prompts(DataConfig(path=str(file), chat_template=True), tokenizer, 99, 0).prompts
    (question,) = open_questions(QuestionOptions(None, file, chat=True), decoder).requests(4)
    assert prompt.ids.tolist() == question.prompt_ids.tolist() == once
    assert len(api.load(begins).generate(["1+1"], chat=True, max_new_tokens=2)) == 1


@pytest.mark.parametrize("chat", [False, True])
def test_lm_eval_encodes_as_everything_else(begins, monkeypatch, chat) -> None:
    """A template without a beginning token: its text gets none, as in training."""
    decoder, seen = CheckpointDecoder(begins), []
    decoder.tokenizer.chat_template = TEMPLATE.replace("<s>", "")
    model = OpdlmLM(decoder)
    context = model.apply_chat_template([{"role": "user", "content": "1+1"}]) if chat else "1+1="
    answer = decoder.answer
    monkeypatch.setattr(decoder, "answer", lambda part, *how: seen.extend(part) or answer(part, *how))
    model.generate_until(asked([context], until=["never"], max_gen_toks=2), disable_tqdm=True)
    plain = decoder.tokenizer("1+1=", add_special_tokens=False)["input_ids"]
    assert seen[0].prompt_ids.tolist() == (plain if chat else [BOS, *plain])


def test_the_plan_shows_the_first_prompts_tokens(begins, tmp_path) -> None:
    run = tmp_path / "run.yaml"
    file = jsonl(tmp_path / "d.jsonl", {"prompt": "1+1="})
    run.write_text(
        yaml.safe_dump(
            {"model": {"teacher": str(begins)}, "data": {"path": str(file)}, "rollout": {"max_new_tokens": 8}}
        )
    )
    assert "first prompt │ 5 tokens: <s> 1 + 1 =" in opdlm("train", run, "--dry-run")
    opdlm("plan", run, "--json", tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["run"]["first prompt"] == "5 tokens: <s> 1 + 1 ="


@pytest.mark.parametrize(
    ("template", "arguments"),
    [
        ("$A", ("'47+8-3='", ", add_special_tokens=False,")),
        ("<s> $A", ("'47+8-3='", ", return")),
        ("<s> $A [SEP]", ("'<s>47+8-3='", ", add_special_tokens=False,")),
    ],
)
def test_the_card_of_an_export_encodes_its_prompt_likewise(tmp_path, template, arguments) -> None:
    convert_checkpoint(with_post_processor(tmp_path / "m", template), tmp_path / "student", 4, "absolute")
    text, others = arguments
    for layout, called in (("a2d-llama", f"tokenizer([{text}]{others}"), ("llama", f"tokenizer({text}{others}")):
        export(tmp_path / "student", tmp_path / layout, layout)  # type: ignore[arg-type]
        assert called in (tmp_path / layout / "README.md").read_text()


# --- options that would be ignored --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "chain", "--answer", "math"), "--answer: found math; it goes with --data, not with --task"),
        (("--task", "chain", "--prompt-field", "q"), "--prompt-field: found q; it goes with --data, not with --task"),
        (("--task", "chain", "--answer-field", "a"), "--answer-field: found a; it goes with --data, not with --task"),
        (("--task", "chain", "--thinking"), "--thinking: found without --chat; only a chat template knows it"),
        (("--data", "d.jsonl", "--no-thinking"), "--no-thinking: found without --chat"),
        (("--task", "chain", "--gpus-per-actor", 1), "--gpus-per-actor: found 1 with --actors 0; without actors"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "sweep"])
def test_options_that_mean_nothing_together_are_refused(ends, command, arguments, message) -> None:
    text = opdlm(command, ends, *arguments, code=2)
    assert text.startswith(f"opdlm: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--answer", "math"), "--answer: found math; it goes with --data, not with --lm-eval"),
        (("--prompt-field", "q"), "--prompt-field: found q; it goes with --data, not with --lm-eval"),
        (("--thinking",), "--thinking: found without --chat"),
    ],
)
def test_the_same_beside_lm_eval(ends, arguments, message) -> None:
    assert opdlm("eval", ends, "--lm-eval", "gsm8k", *arguments, code=2).startswith(f"opdlm: {message}")
