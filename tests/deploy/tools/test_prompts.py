"""`opdlm prompts` as a user calls it, with data sets that stand in for the hub's. Nothing is downloaded.

`pytest tests/deploy/tools/test_prompts.py`
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from opdlm.common.config import load_config
from opdlm.common.config.schema import DataConfig
from opdlm.common.data.prompt_sets.hub import hub_sets
from opdlm.common.data.rows import read_rows
from opdlm.deploy.run.recipes import find_run_file
from tests.deploy.cli.test_cli import opdlm

ROWS = 40
LICENCES: dict[str, Any] = {"openai/gsm8k": ["mit"], "allenai/sciq": "cc0-1.0", "KodCode/KodCode-Light-RL-10K": None}


@dataclass
class Hub:
    """What the stand-in was asked for, and what it does wrong."""

    loaded: list[tuple[str, str | None, str, str]]
    failure: Exception | None = None
    columns: tuple[str, ...] = ("question", "prompt", "problem", "messages", "level", "answer")


@pytest.fixture
def hub(monkeypatch) -> Hub:
    asked = Hub([])

    def dataset_info(self, repo_id: str, timeout: float) -> SimpleNamespace:
        if asked.failure is not None:
            raise asked.failure
        return SimpleNamespace(sha=f"sha of {repo_id}", card_data={"license": LICENCES.get(repo_id, "mit")})

    def load_dataset(path: str, name: str | None, split: str, revision: str, streaming: bool) -> Any:
        assert streaming, "a few thousand prompts do not need a whole data set"
        asked.loaded.append((path, name, split, revision))
        return datasets.Dataset.from_list([_row(path, name, split, i) for i in range(ROWS)]).to_iterable_dataset()

    def _row(path: str, name: str | None, split: str, number: int) -> dict[str, Any]:
        # Every fifth row repeats another one, every seventh is empty.
        text = "" if number % 7 == 6 else f" {path} {name} {split} {number - (number % 5 == 4)} "
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": text}]
        messages += [{"role": "assistant", "content": "a"}, {"role": "user", "content": "later"}]
        row: dict[str, Any] = dict.fromkeys(("question", "prompt", "problem", "answer"), text)
        row |= {"messages": messages, "level": f"Level {number % 5 + 1}"}
        return {column: row[column] for column in asked.columns}

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_sets_are_listed_with_sizes_network_and_licences() -> None:
    text = opdlm("prompts")
    assert "everyday: short questions and tasks of" in text
    assert "prompts, no network" in text
    assert "61,816 prompts, from the Hugging Face hub: " in text
    assert "KodCode/KodCode-Light-RL-10K: cc-by-nc-4.0" in text
    assert "Nemotron-Post-Training-Dataset-v2: cc-by-4.0; its conditions are to be accepted there first" in text


def test_the_built_in_set_needs_no_network_and_can_be_trained_on(tmp_path, hub) -> None:
    out = tmp_path / "new" / "everyday.jsonl"
    hub.failure = OSError("no network")
    text = opdlm("prompts", "everyday", "--out", out, "--seed", 3, "--limit", 200)
    assert "200 prompts (" in text
    assert f"data: {{path: {out}, chat_template: true}}" in text
    rows = list(read_rows(DataConfig(path=str(out), chat_template=True), 0))
    assert len({row.prompt for row in rows}) == 200
    assert len({row.domain for row in rows}) > 20
    note = json.loads((tmp_path / "new" / "everyday.jsonl.provenance.json").read_text())
    assert (note["set"], note["seed"], note["limit"], note["prompts"], note["sources"]) == ("everyday", 3, 200, 200, [])
    assert note["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    opdlm("prompts", "everyday", "--out", tmp_path / "more.jsonl", "--seed", 3, "--limit", 300)
    assert read(tmp_path / "more.jsonl")[:200] == read(out), "a smaller file is the begin of a larger one"


def test_a_mixture_takes_its_share_of_every_source_and_notes_where_it_is_from(tmp_path, hub) -> None:
    out = tmp_path / "mix.parquet"
    text = opdlm("prompts", "open-mix", "--out", out, "--limit", 80)
    rows = pq.read_table(out).to_pylist()
    assert Counter(row["domain"] for row in rows) == {"math": 20, "code": 20, "science": 20, "chat": 20}
    assert len({row["prompt"] for row in rows}) == 80
    assert [row["domain"] for row in rows] != sorted(row["domain"] for row in rows), "the sources are mixed"
    assert "openai/gsm8k: licence mit, revision sha of opena" in text
    assert "allenai/sciq: licence cc0-1.0 (when this set was put together: cc-by-nc-3.0), revision" in text
    assert text.count("EleutherAI/hendrycks_math: licence") == 1
    assert ("openai/gsm8k", "main", "train", "sha of openai/gsm8k") in hub.loaded
    note = json.loads(out.with_name("mix.parquet.provenance.json").read_text())
    assert sum(source["prompts"] for source in note["sources"]) == 80
    science = next(source for source in note["sources"] if source["id"] == "allenai/sciq")
    assert (science["wanted"], science["prompts"], science["license"]) == (20, 20, "cc0-1.0")
    assert science["revision"] == "sha of allenai/sciq"
    assert science["skipped"].keys() <= {"there already", "no text"}


def test_the_seed_decides_the_choice(tmp_path, hub) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        opdlm("prompts", "open-mix", "--out", tmp_path / f"{name}.jsonl", "--seed", seed, "--limit", 40)
    first, again, other = (read(tmp_path / f"{name}.jsonl") for name in "abc")
    assert first == again
    assert {row["prompt"] for row in first} != {row["prompt"] for row in other}


def test_a_source_with_too_few_rows_is_told(tmp_path, hub) -> None:
    text = opdlm("prompts", "open-mix", "--out", tmp_path / "all.jsonl")
    taken = len({number - (number % 5 == 4) for number in range(ROWS) if number % 7 != 6})
    assert f"allenai/sciq train: {taken} of 10,000 wanted prompts of {ROWS} rows; left out: " in text
    assert f"left out: {ROWS - 5 - taken} there already, 5 no text" in text or "5 no text, " in text


def test_of_a_conversation_the_first_user_message_is_taken(tmp_path, hub) -> None:
    opdlm("prompts", "paper-mix", "--out", tmp_path / "p.jsonl", "--limit", 24)
    chat = [row["prompt"] for row in read(tmp_path / "p.jsonl") if row["domain"] == "chat"]
    assert len(chat) == 6
    assert all(prompt.startswith("nvidia/Nemotron-Post-Training-Dataset-v2 None chat ") for prompt in chat)


def test_rows_of_other_levels_are_left_out_and_the_recipe_finds_its_column(tmp_path, hub) -> None:
    out = tmp_path / "math.jsonl"
    text = opdlm("prompts", "math-level3-5", "--out", out)
    assert "another kind of row" in text
    assert f"path: {out}, prompt_field: problem, " in text
    levels = {int(row["problem"].split()[-1]) % 5 + 1 for row in read(out)}
    assert levels <= {3, 4, 5}
    for name in ("math-thinking", "math-non-thinking"):
        assert load_config(find_run_file(Path(name))).data.prompt_field == hub_sets()["math-level3-5"].field


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            ConnectionError("[Errno -3] no name"),
            "openai/gsm8k could not be read from the hub: [Errno -3] no name; th",
        ),
        (OSError(""), "could not be read from the hub: OSError; this set needs network, `everyday` needs none"),
        (GatedRepoError, "may be read only by those who accepted its conditions"),
        (RepositoryNotFoundError, "the hub has no data set openai/gsm8k that this account may read"),
    ],
)
def test_what_the_hub_refuses_is_one_line(tmp_path, hub, failure, message) -> None:
    answer = SimpleNamespace(headers={}, request=None)
    hub.failure = failure if isinstance(failure, Exception) else failure("no", response=answer)
    text = opdlm("prompts", "open-mix", "--out", tmp_path / "p.jsonl", code=2)
    assert text.startswith(("opdlm: prompts: openai/gsm8k", "opdlm: prompts: the hub"))
    assert message in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_a_data_set_that_has_changed_is_one_line(tmp_path, hub) -> None:
    hub.columns = ("answer",)
    text = opdlm("prompts", "open-mix", "--out", tmp_path / "p.jsonl", code=2)
    assert "prompts: openai/gsm8k main train has no column 'question'; it has answer; the data set has changed" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("everyda", "--out", "NEW.jsonl"),
            "prompts: found 'everyda'; known: everyday, paper-mix, open-mix, math-level3",
        ),
        (("everyday",), "--out: missing; give a new file that ends with .jsonl or .parquet"),
        (("--out", "NEW.jsonl"), "--out: found without NAME; name a set (`opdlm prompts` lists them)"),
        (("everyday", "--out", "NEW.csv"), "NEW.csv; give a file that ends with .jsonl or .parquet"),
        (("everyday", "--out", "OLD.jsonl"), "OLD.jsonl exists; give a new file, or remove it"),
        (("everyday", "--out", "OLD.jsonl/x.jsonl"), "x.jsonl cannot be written"),
        (("everyday", "--out", "NEW.jsonl", "--limit", "0"), "--limit"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OLD.jsonl").write_text("kept")
    assert message in opdlm("prompts", *arguments, code=2)
    assert [file.name for file in tmp_path.iterdir()] == ["OLD.jsonl"]
    assert (tmp_path / "OLD.jsonl").read_text() == "kept"


def test_the_sets_hold_what_the_recipes_ask_for() -> None:
    sets = hub_sets()
    assert sets["paper-mix"].prompts == 61_816
    for mixture in (sets["paper-mix"], sets["open-mix"]):
        by_domain: Counter[str] = Counter()
        for source in mixture.sources:
            by_domain[source.domain] += source.prompts or 0
        assert by_domain.keys() == {"math", "code", "science", "chat"}
        assert len(set(by_domain.values())) == 1
        assert mixture.field == load_config(find_run_file(Path("qwen3-0.6b"))).data.prompt_field
    for limit in (1, 7, 39_999, 99_999):
        assert sets["open-mix"].limited(limit).prompts == min(limit, 40_000)
