"""Tasks, prompts and their order, and the limits of the curriculum. `pytest tests/common/data/test_prompts.py`"""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest

from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import DataConfig, Schedule
from opdlm.common.curriculum import dynamic_threshold, length_limit, scheduled
from opdlm.common.data.prompts import PromptOrder, load_prompts
from opdlm.common.data.tasks import TASKS, get_task, problems
from opdlm.common.data.tasks.base import split_of
from opdlm.common.errors import ConfigError
from opdlm.common.model.char_tokenizer import build_char_tokenizer

TOKENIZER = build_char_tokenizer("0123456789+-=;")


def test_solutions_of_the_chain_task_are_right() -> None:
    for problem in itertools.islice(problems(get_task("chain"), "train", 0), 300):
        *steps, answer = problem.solution.split(";")
        assert all(eval(left) == int(right) for left, right in (step.split("=") for step in steps))
        assert eval(problem.prompt.removesuffix("=")) == int(answer)
        assert all(0 <= int(n) <= 59 for n in re.findall(r"=(\d+)", problem.solution))
        assert get_task("chain").is_correct(problem, problem.solution)
        assert not get_task("chain").is_correct(problem, problem.solution + "1")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_splits_are_disjoint_and_equal_seeds_give_equal_problems(name) -> None:
    task = get_task(name)
    train = list(itertools.islice(problems(task, "train", 0), 500))
    test = list(itertools.islice(problems(task, "test", 1), 500))
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert train == list(itertools.islice(problems(task, "train", 0), 500))
    assert {split_of(p.prompt) for p in test} == {"test"}
    assert set("".join(p.prompt + p.solution for p in train)) <= set(task.alphabet)


def test_unknown_task_is_named() -> None:
    with pytest.raises(ConfigError, match="found 'chian'; known tasks: add, chain"):
        get_task("chian")


def test_jsonl_prompts(tmp_path) -> None:
    rows = [{"prompt": "1+2=", "domain": "math"}, {"prompt": [4, 5, 6]}, {"prompt": "9" * 50}, {"prompt": ""}]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows))
    found = load_prompts(DataConfig(path=str(file)), TOKENIZER, longest=10, seed=0)
    assert [p.prompt_id for p in found.prompts] == ["p.jsonl:1", "p.jsonl:2"]
    assert found.prompts[0].domain == "math"
    assert found.prompts[1].ids.tolist() == [4, 5, 6]
    assert found.refused == ["p.jsonl:3: 50 tokens; expected 1 to 10", "p.jsonl:4: 0 tokens; expected 1 to 10"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompt to train on"),
        ('{"prompt": "' + "1" * 99 + '"}', r"no prompt to train on in .*; first refusal: p.jsonl:1: 99 tokens"),
        ('{"text": "x"}', "data.prompt_field: p.jsonl:1 has no `prompt`; found: text"),
        ('{"prompt": 3}', "data.prompt_field: p.jsonl:1: `prompt` is 3; expected text, token ids or chat messages"),
        (
            '{"prompt": null}',
            "data.prompt_field: p.jsonl:1: `prompt` is None; expected text, token ids or chat messages",
        ),
        ("{broken", "p.jsonl:1 is not JSON"),
        ("[1]", "p.jsonl:1 holds a list; expected an object"),
    ],
)
def test_bad_data_is_named(tmp_path, content, message) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_prompts(DataConfig(path=str(file)), TOKENIZER, longest=10, seed=0)
    with pytest.raises(ConfigError, match="does not exist"):
        load_prompts(DataConfig(path=str(tmp_path / "no.jsonl")), TOKENIZER, longest=10, seed=0)


def test_each_epoch_has_its_own_permutation_of_the_prompts() -> None:
    prompts = load_prompts(DataConfig(task="chain", prompts=20), TOKENIZER, longest=30, seed=0).prompts
    order = PromptOrder(prompts, seed=3, epochs=2)
    names = [order[i].prompt_id for i in range(order.total)]
    first, second = names[:20], names[20:]
    assert sorted(first) == sorted(second) == sorted(p.prompt_id for p in prompts)
    assert first != second
    again = PromptOrder(prompts, seed=3, epochs=2)
    assert [again[i].prompt_id for i in reversed(range(40))] == names[::-1]


def test_schedules_of_the_paper_and_of_the_release() -> None:
    release = Schedule(kind="cosine", start=100, end=4000, rounds=100)
    for r in (0, 1, 37, 100, 150):
        assert scheduled(release, r) == pytest.approx(100 + 3900 * (1 - math.cos(math.pi / 2 * min(r, 100) / 100)))
    paper = Schedule(kind="linear", start=100, end=4000, rounds=10)
    assert np.allclose([scheduled(paper, r) for r in (0, 5, 10, 99)], [100, 2050, 4000, 4000])
    assert scheduled(Schedule(start=7), 55) == 7


def test_the_smallest_length_limit_of_a_rollout_applies() -> None:
    config = config_from_dict(
        {
            "model": {"teacher": "t"},
            "data": {"path": "p"},
            "rollout": {"max_new_tokens": 3000},
            "curriculum": {
                "max_new_tokens": {"kind": "linear", "start": 100, "end": 3000, "rounds": 10},
                "threshold": {"kind": "linear", "start": 1.0, "end": 0.9, "rounds": 10},
                "max_new_tokens_per_domain": {"code": 2048},
            },
        }
    )
    assert [length_limit(config, r) for r in (0, 5, 10, 20)] == [100, 1550, 3000, 3000]
    assert length_limit(config, 20, "code") == 2048
    assert length_limit(config, 0, "code") == 100
    assert length_limit(config, 20, "math") == 3000
    assert dynamic_threshold(config, 5) == pytest.approx(0.95)
