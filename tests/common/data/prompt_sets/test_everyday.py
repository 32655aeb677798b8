"""The built-in prompts: how many, of how many kinds, the same for a seed, and none of them a knowledge question.

`pytest tests/common/data/prompt_sets/test_everyday.py`
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import opdlm.deploy
from opdlm.common.data.prompt_sets.everyday import FOLDER, everyday_prompts
from opdlm.common.data.prompt_sets.held_out import is_held_out

KNOWLEDGE = Path(opdlm.deploy.__file__).parent / "questions" / "knowledge.jsonl"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return everyday_prompts(seed=0)


def test_there_are_thousands_of_distinct_prompts_of_many_kinds(rows) -> None:
    assert len(rows) >= 6000
    assert len({row["prompt"] for row in rows}) == len(rows)
    kinds = Counter(row["domain"] for row in rows)
    assert len(kinds) >= 25
    assert min(kinds.values()) >= 5
    assert max(kinds.values()) < len(rows) / 10, "one kind outweighs the others"


def test_prompts_are_whole_short_lines_of_plain_text(rows) -> None:
    for prompt in (row["prompt"] for row in rows):
        assert prompt == " ".join(prompt.split())
        assert prompt.isascii()
        assert len(prompt) < 220
        assert not re.search(r"[{}$|]", prompt), f"a slot is left open: {prompt}"
        assert not re.search(r"\ba [aeio]", prompt.replace("a one", "")), f"wrong article: {prompt}"


def test_a_seed_gives_the_same_prompts_again_and_another_seed_others(rows) -> None:
    assert everyday_prompts(seed=0) == rows
    others = everyday_prompts(seed=1)
    assert others != rows
    assert 0.2 < len({r["prompt"] for r in others} & {r["prompt"] for r in rows}) / len(rows) < 0.9
    # Pinned, so that a file made elsewhere, or by another version of Python, has the same prompts.
    assert json.loads((Path(__file__).parent / "everyday_first.json").read_text()) == rows[:8]


def test_no_prompt_is_of_a_kind_that_is_kept_for_evaluation(rows) -> None:
    for prompt in (row["prompt"].lower() for row in rows):
        assert not re.search(r"\bcapitals?\b(?! letters)", prompt), prompt
        assert not re.search(r"\bcontinents?\b|\blanguages?\b|\bcountr(y|ies)\b(?!\")", prompt), prompt


def test_no_prompt_has_a_held_out_key(rows) -> None:
    prompts = [row["prompt"] for row in rows if row["domain"] == "opposites"]
    words = [re.search(r'"(.+)"|of (\w+)\?', prompt) for prompt in prompts]
    assert {is_held_out(str(word and (word[1] or word[2]))) for word in words} == {False}
    sums = [re.findall(r"\d+", row["prompt"]) for row in rows if row["domain"] in ("sums", "word_problems")]
    assert not any(is_held_out(f"{a}+{b}") or is_held_out(f"{b}+{a}") for a, b in sums)
    assert len(sums) > 300


def test_held_out_keys_are_about_three_of_ten_whatever_their_case_and_ends() -> None:
    keys = [f"{a}+{b}" for a in range(50) for b in range(50)]
    assert sum(map(is_held_out, keys)) / len(keys) == pytest.approx(0.3, abs=0.03)
    assert [is_held_out(key) for key in ("Left", " left", "left?", "LEFT ")] == [is_held_out("left")] * 4
    assert is_held_out("the  Moon") == is_held_out("the moon")


def test_the_data_files_stay_readable() -> None:
    for file in FOLDER.glob("*.yaml"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# "), file.name
        assert len(lines) <= 300
        assert max(map(len, lines)) <= 120


def test_no_prompt_is_a_knowledge_question(rows) -> None:
    questions = [json.loads(line) for line in KNOWLEDGE.read_text(encoding="utf-8").splitlines()]
    prompts = {_plain(row["prompt"]) for row in rows}
    for question in questions:
        assert _plain(question["prompt"]) not in prompts
    # A fact in other words: the same sum, or all words of the question that carry its meaning.
    contents = [(_content(row["prompt"]), row["prompt"]) for row in rows]
    for question in questions:
        asked = _content(question["prompt"])
        same = [prompt for words, prompt in contents if asked.total() > 1 and asked <= words]
        assert not same, f"{question['prompt']!r} is asked by {same[0]!r}"


_EMPTY = frozenset(
    re.findall(
        r"\w+",
        """a an the is are was were be do does did of in on at to for and or with from by as it its this that what which
        who whom whose how many much when where why has have had you your can will word name give tell answer question
        one sentence short simple words few please""",
    )
)
"""Words that say nothing of what is asked."""


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+|[-+*/]", text.lower()))


def _content(text: str) -> Counter[str]:
    return Counter(word for word in _plain(text).split() if word not in _EMPTY)
