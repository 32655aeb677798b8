"""`opdlm eval --data` and `opdlm sweep`. `pytest tests/deploy/evaluate/test_commands.py`"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from opdlm.api import evaluate
from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.deploy.evaluate.actor_decoder import split
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.options import QuestionOptions
from opdlm.deploy.evaluate.questions import open_questions
from tests.deploy.cli.test_cli import opdlm
from tests.deploy.observe.test_tables import words
from tests.tiny import request, save_lossless

PROMPTS = ["1+2=", "30-4+5=", "7+7=", "12-3="]


@pytest.fixture(scope="module")
def student(chain_teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "student"
    convert_checkpoint(chain_teacher, folder, 4, "absolute")
    return folder


def _write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_data_with_answers(student, tmp_path) -> None:
    """The references are the student's own greedy answers. The first one is changed, so 3 of 4 answers are right."""
    decoder = CheckpointDecoder(student)
    blank = _write(tmp_path / "blank.jsonl", [{"prompt": p, "answer": ""} for p in PROMPTS])
    requests = open_questions(QuestionOptions(None, blank), decoder).requests(12)
    answers = decoder.answer(requests, replace(decoder.base, threshold=0.9), 4)
    texts = [decoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers.responses]
    rows = [{"q": p, "gold": f" {t}" if i else f"{t}0"} for i, (p, t) in enumerate(zip(PROMPTS, texts, strict=True))]
    data = _write(tmp_path / "rows.jsonl", rows)
    fields = ("--data", data, "--prompt-field", "q", "--answer-field", "gold", "--max-new-tokens", 12)
    text = opdlm("eval", student, *fields, "--strategy", "low_confidence_dynamic", "--output", tmp_path / "o.json")
    assert "4 rows of rows.jsonl" in text
    (row,) = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert (row["right"], row["tokens_per_step"]) == (0.75, answers.tokens_per_step)
    opdlm("eval", student, *fields, "--problems", 3, "--output", tmp_path / "o.json")
    assert {r["responses"] for r in json.loads((tmp_path / "o.json").read_text())["rows"]} == {3}


def test_empty_responses_are_marked_and_counted(chain_teacher, student, tmp_path) -> None:
    """All logits are equal, so the first token is drawn again and again: padding, which has no text."""
    for folder in (chain_teacher, student):
        shutil.copytree(folder, broken := tmp_path / folder.name)
        tensors = load_file(broken / "model.safetensors")
        matrix = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
        tensors[matrix].zero_()
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        text = opdlm("generate", broken, "-p", "1+2=", "-p", "4-3=", "--max-new-tokens", 8)
        assert text.count("(empty response: it ended at once, or holds no text)") == 2
        assert "opdlm: warning: 2 of 2 responses are empty" in text
        asked = ("--task", "chain", "--problems", 3, "--max-new-tokens", 8, "--output", tmp_path / "o.json")
        assert "3 of 3 responses are empty: they hold no text" in opdlm("eval", broken, *asked)
        rows = json.loads((tmp_path / "o.json").read_text())["rows"]
        assert [(row["empty"], row["responses"]) for row in rows] == [(3, 3)] * len(rows)
    assert "empty" not in opdlm("generate", chain_teacher, "-p", "1+2=")


def test_math_marks_what_the_responses_say(student, tmp_path) -> None:
    data = _write(tmp_path / "math.jsonl", [{"prompt": "1+1=", "answer": a} for a in (52, "0.5", "3", 7)])
    decoder = CheckpointDecoder(student)
    questions = open_questions(QuestionOptions(None, data, answer="math"), decoder)
    said = ["50+2=52;52", "1-0=1", "+-", "7"]
    marks = questions.mark([decoder.encode(text) for text in said])
    assert (marks.right, marks.unanswered) == (0.5, 1)
    assert "unanswered" in opdlm("eval", student, "--data", data, "--answer", "math", "--max-new-tokens", 4)


def test_sweep_gives_the_figures_of_direct_evaluation(student, tmp_path) -> None:
    out = tmp_path / "figure.png"
    options = ("--problems", 12, "--max-new-tokens", 12, "--block-size", "8,4", "--threshold", "0.9,0.2,0.5")
    with_threshold = ("low_confidence_dynamic", "sequential_dynamic")
    strategies = [part for name in ("low_confidence_static", *with_threshold) for part in ("--strategy", name)]
    opdlm("sweep", student, "--task", "chain", *options, *strategies, "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")
    written = json.loads(out.with_suffix(".json").read_text())
    assert written["questions"] == "12 held-out problems of chain"
    assert written["checkpoints"] == {
        str(student): {"folder": str(student), "block_grid": "absolute", "trained_block_size": 4}
    }
    ways = [(p["block_size"], p["strategy"], p["threshold"]) for p in written["points"]]
    dynamic = [(b, name, t) for name in with_threshold for b in (4, 8) for t in (0.2, 0.5, 0.9)]
    static = [(b, "low_confidence_static", None) for b in (4, 8)]
    assert sorted(ways, key=str) == sorted([*dynamic, *static], key=str)
    decoder = CheckpointDecoder(student)
    questions = open_questions(QuestionOptions("chain", None, problems=12), decoder)
    for point in written["points"]:
        settings = replace(decoder.base, block_size=point["block_size"], strategy=point["strategy"])
        settings = replace(settings, threshold=point["threshold"] or 0.0)
        answers = decoder.answer(questions.requests(12), settings, 5)
        assert point["right"] == questions.mark(answers.responses).right
        assert point["tokens_per_step"] == pytest.approx(answers.tokens_per_step)
    assert not list(tmp_path.glob(".*"))


def test_the_function_decodes_as_the_command_does(student, chain_teacher, tmp_path) -> None:
    """A checkpoint has its usual ways unless others are asked for."""
    lossless, asked = save_lossless(chain_teacher, tmp_path), {"task": "chain", "problems": 3, "max_new_tokens": 9}
    assert [row["decoding"] for row in evaluate(lossless, **asked)] == ["verified"]
    found = evaluate(student, **asked)
    fields = ("--task", "chain", "--problems", 3, "--max-new-tokens", 9)
    opdlm("eval", student, *fields, "--output", tmp_path / "o.json")
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    told = ("decoding", "right", "tokens_per_step")
    assert [[row[name] for name in told] for row in found] == [[row[name] for name in told] for row in rows]
    assert [row["decoding"] for row in evaluate(student, strategies=["sequential"], **asked)] == ["sequential"]


def test_sweep_of_several_checkpoints(student, chain_teacher, tmp_path) -> None:
    """Each has its own ways: an autoregressive one is a point, a lossless one is decoded by verification."""
    models = f"AR={chain_teacher}", str(student), f"drafts={save_lossless(chain_teacher, tmp_path)}"
    asked = ("--task", "chain", "--problems", 5, "--max-new-tokens", 9, "--threshold", "0.9,0.3")
    text = opdlm("sweep", *models, *asked, "--out", tmp_path / "all.png")
    assert "AR, autoregressive" in words(text)
    assert "drafts, verified" in words(text)
    written = json.loads((tmp_path / "all.json").read_text())
    assert list(written["checkpoints"]) == ["AR", str(student), "drafts"]
    assert written["checkpoints"]["AR"] == {"folder": str(chain_teacher)}
    ways = [(p["checkpoint"], p["block_size"], p["strategy"], p["threshold"]) for p in written["points"]]
    assert ways == [
        ("AR", None, None, None),
        (str(student), 4, "low_confidence_dynamic", 0.3),
        (str(student), 4, "low_confidence_dynamic", 0.9),
        ("drafts", 4, "verified", None),
    ]
    alone, *_, lossless = written["points"]
    assert alone["tokens_per_step"] == 1
    assert alone["right"] == lossless["right"]
    assert "found the name 'a' twice" in opdlm("sweep", f"a={student}", f"a={student}", *asked, code=2)
    text = opdlm("sweep", f"a={chain_teacher}", f"b={chain_teacher}", *asked, code=2)
    assert "sweep: all models are autoregressive; it takes a student" in text


def test_sweep_writes_beside_the_checkpoint(student) -> None:
    opdlm("sweep", student, "--task", "chain", "--problems", 3, "--max-new-tokens", 4, "--threshold", 0.5)
    assert {"sweep.png", "sweep.json"} <= {file.name for file in student.parent.iterdir()}


def test_mistakes_are_named(student, chain_teacher, tmp_path) -> None:
    good = _write(tmp_path / "good.jsonl", [{"prompt": "1+2=", "answer": "3"}])
    bad = _write(tmp_path / "bad.jsonl", [{"prompt": "1+2=", "answer": "3"}, {"prompt": "1", "answer": None}])
    for command, arguments, message in [
        ("eval", (), "found neither of --task and --data; give one"),
        ("eval", ("--task", "chain", "--data", good), "found both of --task and --data; give one"),
        ("eval", ("--data", tmp_path / "no.jsonl"), "no.jsonl does not exist; expected a JSONL file"),
        (
            "eval",
            ("--data", good, "--answer-field", "gold"),
            "--answer-field: good.jsonl:1 has no `gold`; found: prompt",
        ),
        ("eval", ("--data", bad), "--answer-field: bad.jsonl:2: `answer` is None; expected text"),
        ("eval", ("--data", good, "--chat"), "chat template: "),
        ("eval", ("--data", good, "--max-new-tokens", 500), "good.jsonl:1: 4 prompt tokens and at most 500 new ones"),
        ("sweep", ("--task", "chain", "--threshold", "0.5,high"), "--threshold: found '0.5,high'; expected numbers"),
        ("sweep", ("--task", "chain", "--threshold", "0.5,9"), "--threshold: found '0.5,9'; each has to lie within 0"),
        ("sweep", ("--task", "chain", "--block-size", "0"), "--block-size: found '0'; each has to lie within 1"),
        ("sweep", ("--task", "chain", "--out", tmp_path / "x.pdf"), "x.pdf; expected a .png"),
        ("sweep", ("--task", "chain", "--out", tmp_path / "no" / "x.png"), "which does not exist; give a new file"),
    ]:
        assert message in opdlm(command, student, *arguments, code=2)
    unreadable = _write(tmp_path / "odd.jsonl", [{"prompt": "1+2=", "answer": ""}])
    text = opdlm("eval", student, "--data", unreadable, "--answer", "math", code=2)
    assert "--answer math: odd.jsonl:1: math-verify reads no answer in ''" in text
    text = opdlm("sweep", chain_teacher, "--task", "chain", code=2)
    assert "is autoregressive; it takes a student to have blocks and thresholds" in text


def test_requests_are_split_so_that_every_actor_has_work() -> None:
    requests = [request(3, i) for i in range(103)]
    for actors, batch_size, parts in [(1, 200, 1), (2, 64, 2), (2, 8, 8), (4, 1, 15), (200, 8, 103)]:
        cut = split(requests, actors, batch_size)
        assert [r.index for part in cut for r in part] == list(range(103))
        assert len(cut) == parts


def test_what_does_not_fit_the_context_says_what_would(student, chain_teacher) -> None:
    for grid, block in (("absolute", 4), ("response", 4), ("absolute", 7), ("response", 7)):
        decoder = CheckpointDecoder(student, block)
        decoder.base = replace(decoder.base, block_grid=grid)
        for length in (1, 5, 6, 100, 121, 124, 125, 127):
            with pytest.raises(OpdlmError) as refused:
                decoder.check_room([request(length, limit=10_000)])
            assert f"{length} prompt tokens and at most 10000 new ones take" in str(refused.value)
            assert "more than the context of 128 (config.json)" in str(refused.value)
            fits = next(n for n in range(128, -1, -1) if n == 0 or _fits(decoder, length, n))
            expected = f"at most {fits} new ones fit after it (--max-new-tokens)" if fits else "shorten the prompt"
            assert str(refused.value).endswith(f"; {expected}")
    text = opdlm("generate", student, "-p", "1+2=", "--max-new-tokens", 10000, code=2)
    assert "4 prompt tokens and at most 10000 new ones take 10004 positions" in text
    assert "at most 124 new ones fit after it (--max-new-tokens)" in text
    assert "(config.json); shorten the prompt" in opdlm("generate", chain_teacher, "-p", "1" * 128, code=2)


def _fits(decoder: CheckpointDecoder, length: int, limit: int) -> bool:
    try:
        decoder.check_room([request(length, limit=limit)])
    except OpdlmError:
        return False
    return True
