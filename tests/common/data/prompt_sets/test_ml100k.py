"""Cases of MovieLens-100k, of made-up films and users. `pytest tests/common/data/prompt_sets/test_ml100k.py`"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.prompt_sets.ml100k import CANDIDATES, SPLITS, alphabet, ml100k_cases
from opdlm.common.data.prompt_sets.residual_codes import residual_codes
from opdlm.common.data.reranking import RerankCase, read_answer
from opdlm.common.data.rows import read_rows
from opdlm.common.errors import OpdlmError
from tests.deploy.cli.test_cli import opdlm

FILMS, USERS, SEEN = 60, 30, 40


@pytest.fixture
def files(tmp_path) -> Path:
    """Two tastes: films of even numbers, and of odd ones. Each user sees films of his taste, in random order."""
    rng = random.Random(0)
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    items += [f'{i}\tFilm "{i}"\t{1950 + i if i else ""}\t{"Drama" if i % 2 else "Comedy War"}' for i in range(FILMS)]
    rows = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(USERS):
        own = [i for i in range(FILMS) if i % 2 == user % 2] + rng.sample(range(FILMS), 10)
        order = rng.sample(sorted(set(own)), len(set(own)))
        lines = [f"{user}\t{film}\t3\t{1000 + place}" for place, film in enumerate(order)]
        rows += rng.sample(lines, len(lines))
    (tmp_path / "ml-100k.item").write_text("\n".join(items) + "\n")
    (tmp_path / "ml-100k.inter").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_the_command_writes_three_files_that_a_run_reads(files, tmp_path) -> None:
    text = opdlm("prompts", "ml100k", "--files", files, "--out", tmp_path / "cases")
    assert "test: " in text
    made = json.loads((tmp_path / "cases" / "provenance.json").read_text())
    for split in SPLITS:
        data = DataConfig(path=str(tmp_path / "cases" / f"{split}.jsonl"), response_field="response")
        rows = list(read_rows(data, 0))
        assert len(rows) == made["cases"][split] > 20
        for row in rows:
            assert isinstance(row.reference, RerankCase)
            assert len(row.reference.candidates) == CANDIDATES
            order = read_answer(row.reference, str(row.response), has_ended=True).order
            assert order is not None
            assert order[0] == row.reference.target, "the teacher's answer is valid and right"
            assert set(str(row.prompt)) | set(str(row.response)) <= set(alphabet())
    assert "exists" in opdlm("prompts", "ml100k", "--files", files, "--out", tmp_path / "cases", code=2)
    assert "--files: missing" in opdlm("prompts", "ml100k", "--out", tmp_path / "others", code=2)


def test_no_candidate_was_seen_before_and_cases_follow_time(files) -> None:
    cases, seen = ml100k_cases(files), {}
    ids = {entry["text"]: entry["id"] for rows in cases.values() for row in rows for entry in row["candidates"]}
    assert len(set(ids.values())) == len(ids), "no two films have one id"
    for line in (files / "ml-100k.inter").read_text().splitlines()[1:]:
        user, item, _, when = line.split("\t")
        seen.setdefault(user, []).append((int(when), f'Film "{item}"'))
    lives = [[film for _, film in sorted(of)] for of in seen.values()]
    borders = {"train": (0.0, 0.6), "valid": (0.6, 0.8), "test": (0.8, 1.0)}
    for split, rows in cases.items():
        for row in rows:
            history = [entry["text"] for entry in row["history"]]
            target = next(entry["text"] for entry in row["candidates"] if entry["id"] == row["target"])
            [life] = [of for of in lives if target in of and of[: of.index(target)][-6:] == history]
            place = life.index(target)
            assert not {entry["text"] for entry in row["candidates"]} & set(life[:place])
            first, last = (int(len(life) * border) for border in borders[split])
            assert first <= place < last


def test_a_training_case_does_not_know_its_own_target(tmp_path) -> None:
    """One user alone saw films 0 and 1, one after the other; the others saw what follows. His pair says nothing."""
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    items += [f"{i}\tFilm\t1990\tDrama" for i in range(40)]
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    rows += [f"only\t{film}\t{when}" for when, film in enumerate([0, 1, *range(30, 34)])]
    rows += [f"u{u}\t{film}\t{when}" for u in range(3) for when, film in enumerate([0, *range(2, 20)])]
    (tmp_path / "ml-100k.item").write_text("\n".join(items) + "\n")
    (tmp_path / "ml-100k.inter").write_text("\n".join(rows) + "\n")
    train = ml100k_cases(tmp_path)["train"]
    ids = {row["prompt"].partition("|")[0] for row in train}
    alone = [row for row in train if len(row["history"]) == 1]
    assert ids
    assert len(alone) == 3, "each of the others has film 2 after film 0; film 1 after film 0 is no case"


def test_a_broken_file_is_named(tmp_path) -> None:
    with pytest.raises(OpdlmError, match=r"ml-100k.item cannot be read: No such file"):
        ml100k_cases(tmp_path)
    (tmp_path / "ml-100k.item").write_text("a:token\n")
    with pytest.raises(OpdlmError, match=r"ml-100k.item has no column item_id"):
        ml100k_cases(tmp_path)


def test_codes_are_different_and_what_is_alike_shares_letters() -> None:
    rng = np.random.default_rng(0)
    groups = rng.normal(0, 10, (4, 3))
    features = np.repeat(groups, 20, axis=0) + rng.normal(0, 0.1, (80, 3))
    codes = residual_codes(features, [4, 4, 8], seed=0)
    assert len({tuple(code) for code in codes.tolist()}) == 80
    assert [len(set(codes[20 * g : 20 * g + 20, 0])) for g in range(4)] == [1] * 4
    with pytest.raises(ValueError, match="too many"):
        residual_codes(features, [2, 4], seed=0)
