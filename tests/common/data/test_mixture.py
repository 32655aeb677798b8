"""Several sources with weights: what an epoch uses, names, errors, and that the order is a function of the seed.

`pytest tests/common/data/test_mixture.py`
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import DataConfig
from opdlm.common.data.mixture import SourceShare, epoch_prompts
from opdlm.common.data.prompts import PromptOrder, PromptSet, load_prompts
from opdlm.common.errors import ConfigError
from opdlm.common.model.char_tokenizer import build_char_tokenizer

TOKENIZER = build_char_tokenizer("0123456789+=")


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    math = [{"prompt": f"{i}+{i}="} for i in range(10)]
    chat = [{"question": f"{i}=", "domain": "talk" if i else None} for i in range(6)]
    return {"math": write(tmp_path / "math.jsonl", math), "chat": write(tmp_path / "my chat.jsonl", chat)}


def load(files: dict[str, str], math: dict[str, Any], chat: dict[str, Any], **data: Any) -> PromptSet:
    sources = [{"path": files["math"]} | math, {"path": files["chat"], "prompt_field": "question"} | chat]
    return load_prompts(DataConfig(sources=sources, **data), TOKENIZER, longest=30, seed=0)


def used(order: PromptOrder, epoch: int, size: int) -> Counter[str]:
    return Counter(order[index].prompt_id for index in range(epoch * size, (epoch + 1) * size))


def test_an_epoch_uses_each_prompt_as_often_as_the_weight_says(files) -> None:
    found = load(files, {"weight": 2}, {"weight": 0.5})
    assert found.samples_per_epoch == 2 * 10 + 3
    order = PromptOrder(found.prompts, 5, 4, found.shares)
    assert order.total == 4 * 23
    epochs = [used(order, epoch, 23) for epoch in range(4)]
    math = {f"math/math.jsonl:{i}": 2 for i in range(1, 11)}
    for epoch in epochs:
        assert {name: count for name, count in epoch.items() if name.startswith("math/")} == math
    halves = [{name for name in epoch if name.startswith("my_chat/")} for epoch in epochs]
    assert [len(half) for half in halves] == [3] * 4
    assert not halves[0] & halves[1], "a prompt comes again before all others of its source did"
    assert len(halves[0] | halves[1]) == 6
    assert order.samples_by_source(range(23)) == {"math": 20, "my_chat": 3}
    assert len(order.used(23)) == 13
    assert len(order.used(46)) == 16


def test_a_weight_of_one_is_the_data_as_they_are(files, tmp_path) -> None:
    """Then the order is that of one file with the rows of both, so a weight changes nothing else."""
    found = load(files, {}, {})
    order = PromptOrder(found.prompts, 3, 2, found.shares)
    plain = PromptOrder(found.prompts, 3, 2)
    assert [order[i].prompt_id for i in range(32)] == [plain[i].prompt_id for i in range(32)]
    assert order.digest != plain.digest


def test_the_order_is_a_function_of_the_seed_and_the_place(files) -> None:
    found = load(files, {"weight": 0.7}, {"weight": 1.5})
    size = found.samples_per_epoch
    order, again = (PromptOrder(found.prompts, 3, 9, found.shares) for _ in range(2))
    whole = [order[index].prompt_id for index in range(3 * size)]
    assert [again[index].prompt_id for index in reversed(range(3 * size))] == whole[::-1]
    other = PromptOrder(found.prompts, 4, 9, found.shares)
    assert [other[index].prompt_id for index in range(size)] != whole[:size]
    heavier = load(files, {"weight": 0.8}, {"weight": 1.5})
    assert PromptOrder(heavier.prompts, 3, 9, heavier.shares).digest != order.digest


@pytest.mark.parametrize(("weight", "kept"), [(0.1, 30), (0.35, 7), (1 / 3, 9), (2.25, 11), (1e-3, 600)])
def test_parts_of_a_weight_come_round_evenly(weight, kept) -> None:
    share = SourceShare("a", weight, 100, kept)
    times: Counter[int] = Counter()
    for epoch in range(50):
        places = epoch_prompts([share], seed=1, epoch=epoch)
        assert len(places) == share.samples_per_epoch == pytest.approx(weight * kept, abs=0.5)
        times.update(places.tolist())
        uses = [times[place] for place in range(100, 100 + kept)]
        assert max(uses) - min(uses) <= 1
    assert set(times) <= set(range(100, 100 + kept))


def test_names_domains_limits_and_refusals_say_their_source(files, tmp_path) -> None:
    write(tmp_path / "math.jsonl", [{"prompt": "1+2="}, {"prompt": "1" * 50}, {"prompt": "3+4="}])
    found = load(files, {"name": "sums", "domain": "math"}, {"domain": "chat", "prompts": 2})
    names = ["sums/math.jsonl:1", "sums/math.jsonl:3", "my_chat/my chat.jsonl:1", "my_chat/my chat.jsonl:2"]
    assert [p.prompt_id for p in found.prompts] == names
    assert [p.domain for p in found.prompts] == ["math", "math", "chat", "talk"]
    assert found.refused == ["sums/math.jsonl:2: 50 tokens; expected 1 to 30"]
    assert [(share.kept, share.refused) for share in found.shares] == [(2, 1), (2, 0)]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ({"path": "no.jsonl"}, r"^data\.sources\[1\]\.path: no.jsonl does not exist"),
        ({"prompt_field": "text"}, r"^data\.sources\[1\]\.prompt_field: .* has no `text`; found: question, domain"),
        ({"weight": 0.01}, r"^data\.sources\[1\]\.weight: found 0.01, which takes none of the source's 6 prompts"),
        ({"response_field": "a"}, r"^data\.sources\[1\]\.response_field: "),
        ({"path": "empty.jsonl"}, r"^data\.sources\[1\]: found no prompt to train on"),
    ],
)
def test_errors_name_the_source(files, tmp_path, monkeypatch, chat, message) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ConfigError, match=message):
        load(files, {}, chat)


def test_an_error_about_a_setting_of_all_sources_names_the_source_too(files) -> None:
    write(Path(files["math"]), [{"prompt": "1=", "domain": 7}])
    with pytest.raises(ConfigError, match=r"^data\.domain_field: .* is 7; expected text.*\(data\.sources\[0\]\)$"):
        load(files, {}, {})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "a", "sources": [{"path": "b"}]}, "data: found `path` and `sources` of `task`, `path` and `sources`"),
        ({"sources": [{"path": "b", "weight": 0}]}, r"data.sources\[0\].weight: input should be greater than 0"),
        ({"sources": [{"weight": 1}]}, r"data.sources\[0\].path: missing"),
        ({"sources": [{"path": "b", "wieght": 2}]}, r"data.sources\[0\].wieght: unknown key; did you mean `weight`"),
        ({"sources": [{"path": "b", "name": "a b"}]}, r"data.sources\[0\].name: string should match"),
        (
            {"sources": [{"path": "x/b.jsonl"}, {"path": "y/b.jsonl"}]},
            r"data.sources\[1\].name: 'b' is the name of dat",
        ),
        ({"sources": [{"path": "b"}], "prompts": 3}, "data.prompts: found 3 with data.sources; give it to a source"),
        ({"sources": [{"path": "b\0"}]}, r"data.sources\[0\].path: .*NUL"),
        ({"sources": [{"path": "hf://hf_abcdefghijklmnopqrstuv"}]}, r"data.sources\[0\].path: found credentials"),
    ],
)
def test_mistakes_in_a_run_file(data, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"model": {"teacher": "t"}, "data": data})


def test_given_responses_are_needed_of_every_source() -> None:
    raw: dict[str, Any] = {
        "model": {"teacher": "t"},
        "objective": {"kind": "cft", "selection": "random_mask"},
        "offline": {"responses": "data"},
        "data": {"sources": [{"path": "a", "response_field": "r"}, {"path": "b"}]},
    }
    with pytest.raises(ConfigError, match=r"offline.responses: found `data`"):
        config_from_dict(raw)
    raw["data"]["sources"][1]["response_field"] = "q"
    assert len(config_from_dict(raw).data.sources) == 2
