"""Re-ranking cases of MovieLens-100k (METHOD.md section 10): who saw what next, among ten films of a simple retriever.

Two files are read as the package `recbole` ships them, `ml-100k.inter` and `ml-100k.item`. Their terms forbid passing
them on, so they are no part of this package, and what is made of them stays with whoever has them.

    interactions of a user, by time     60 %                20 %                20 %
                                        co-occurrence,      validation cases    test cases
                                        training cases

A case is an interaction whose film is among the ten that the retriever names by the last films before it. In training
cases the user's own pairs of films do not count, because the film to find is one of them.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdlm.common.data.prompt_sets.residual_codes import residual_codes
from opdlm.common.data.reranking import ANSWER_MARK, SEPARATOR
from opdlm.common.errors import OpdlmError

FILES = ("ml-100k.inter", "ml-100k.item")
SPLITS = ("train", "valid", "test")
CANDIDATES, HISTORY = 10, 6
_BORDERS = (0.6, 0.8)
_CODE_LETTERS = ("abcdefghijklmnop", "ABCDEFGHIJKLMNOP", "0123456789qrstuv")
"""The letters of an id's three codes, from coarse to fine, so that no letter means two things."""
_FACTORS = 16
"""Directions of co-occurrence that a film's code depends on."""
_YEAR_SCALE = 20.0


@dataclass(frozen=True, slots=True)
class Films:
    """What is known of each film, in the order of the files' numbers."""

    titles: list[str]
    ids: list[str]
    """Three letters each."""


def ml100k_cases(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split, as `rerank_rows.py` reads them, with a prompt of ids only and the teacher's response.

    The response begins with what the history says of each candidate: how many of its films have the same first letter.
    Its order is the target, then the others as the retriever has them.

    Raises:
        OpdlmError: a file is missing or is not what it should be.
    """
    watched, titles, genres, years = _read(folder)
    parts = [np.split(films, [int(len(films) * border) for border in _BORDERS]) for films in watched]
    together = _together([part[0] for part in parts], len(titles))
    ids = _ids(genres, years, together)
    films = Films(titles, ids)
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for user in parts:
        seen = np.concatenate(user)
        own = np.zeros(len(titles))
        own[user[0]] = 1
        begin = 0
        for split, part in zip(SPLITS, user, strict=True):
            for place in range(max(begin, 1), begin + len(part)):
                before = seen[:place]
                candidates = _retrieve(together, before, own if split == SPLITS[0] else np.zeros(len(titles)))
                if seen[place] in candidates:
                    rows[split].append(_row(films, before[-HISTORY:], candidates, int(seen[place])))
            begin += len(part)
    return rows


def alphabet() -> str:
    """Every character of prompts and responses."""
    return "".join(_CODE_LETTERS) + "|=:;" + SEPARATOR + ANSWER_MARK


def _row(films: Films, history: np.ndarray, candidates: Sequence[int], target: int) -> dict[str, Any]:
    shown, named = [films.ids[film] for film in history], [films.ids[film] for film in candidates]
    first_letters = Counter(film[0] for film in shown)
    reasons = "".join(str(first_letters[film[0]]) for film in named)
    order = [films.ids[target], *(films.ids[film] for film in candidates if film != target)]
    return {
        "history": [{"id": films.ids[film], "text": films.titles[film]} for film in history],
        "candidates": [{"id": films.ids[film], "text": films.titles[film]} for film in candidates],
        "target": films.ids[target],
        "prompt": f"{''.join(shown)}|{''.join(named)}=",
        "response": f"{reasons}{ANSWER_MARK}{SEPARATOR.join(order)}",
    }


def _retrieve(together: np.ndarray, before: np.ndarray, own: np.ndarray) -> list[int]:
    """The ten films that are seen most with the last ones before, and that were not seen yet.

    Args:
        together: `[films, films]`, how many users saw both; on the diagonal, how many saw each.
        own: `[films]`, 1 where this user's pairs are in `together` and do not count.
    """
    popular = np.maximum(np.diag(together) - own, 1)
    last = before[-HISTORY:]
    pairs = together[last] - own[last, None] * own[None, :]
    scores = (pairs / np.sqrt(popular[last, None] * popular[None, :])).sum(0)
    scores[before] = -1
    return [int(film) for film in np.argsort(-scores, kind="stable")[:CANDIDATES]]


def _together(seen: Sequence[np.ndarray], films: int) -> np.ndarray:
    matrix = np.zeros((len(seen), films), dtype=np.float32)
    for user, of in enumerate(seen):
        matrix[user, of] = 1
    return matrix.T @ matrix


def _ids(genres: np.ndarray, years: np.ndarray, together: np.ndarray) -> list[str]:
    """Ids by genre, year and co-occurrence: films that are alike share their first letters."""
    popular = np.maximum(np.diag(together), 1)
    close = together / np.sqrt(popular[:, None] * popular[None, :])
    left, strength, _ = np.linalg.svd(close)
    factors = left[:, :_FACTORS] * strength[:_FACTORS]
    features = [genres / np.maximum(genres.sum(1, keepdims=True), 1), years[:, None], factors]
    scaled = [part / max(float(part.std()), 1e-9) / np.sqrt(part.shape[1]) for part in features]
    codes = residual_codes(np.concatenate(scaled, axis=1), [len(letters) for letters in _CODE_LETTERS], seed=0)
    return ["".join(letters[code] for letters, code in zip(_CODE_LETTERS, each, strict=True)) for each in codes]


def _read(folder: Path) -> tuple[list[np.ndarray], list[str], np.ndarray, np.ndarray]:
    """Films by user in the order of time, titles, genres `[films, genres]` and years `[films]`, scaled."""
    items = list(_table(folder / FILES[1], ("item_id", "movie_title", "release_year", "class")))
    number = {row[0]: place for place, row in enumerate(items)}
    kinds = sorted({kind for row in items for kind in row[3].split()})
    genres = np.array([[kind in row[3].split() for kind in kinds] for row in items], dtype=np.float32)
    known = [int(row[2]) for row in items if row[2].isdigit()]
    middle = float(np.median(known))
    years = np.array([int(row[2]) if row[2].isdigit() else middle for row in items], dtype=np.float32)
    by_user: dict[str, list[tuple[float, int]]] = {}
    for user, item, when in _table(folder / FILES[0], ("user_id", "item_id", "timestamp")):
        if item not in number:
            raise OpdlmError(f"prompts: {folder / FILES[0]} names item {item}, which {FILES[1]} does not have")
        by_user.setdefault(user, []).append((float(when), number[item]))
    watched = [np.array([film for _, film in sorted(of)]) for _, of in sorted(by_user.items())]
    return watched, [row[1] for row in items], genres, (years - middle) / _YEAR_SCALE


def _table(file: Path, columns: Sequence[str]) -> Iterator[list[str]]:
    """The wanted columns of a file of RecBole: tabs between columns, a head of `name:type`."""
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            head = [name.partition(":")[0] for name in next(rows, [])]
            if missing := [name for name in columns if name not in head]:
                raise OpdlmError(f"prompts: {file} has no column {missing[0]}; expected {', '.join(columns)}")
            places = [head.index(name) for name in columns]
            for row in rows:
                yield [row[place] if place < len(row) else "" for place in places]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise OpdlmError(f"prompts: {file} cannot be read: {reason}") from None
