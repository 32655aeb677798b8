"""The re-ranking tables of `opdlm eval`: metrics beside the retriever, and differences (METHOD.md section 10)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from opdlm.common.data.reranking import (
    BY_RANK,
    FAILURES,
    RerankAnswer,
    RerankCase,
    paired_interval,
    ranks,
    rerank_metrics,
)
from opdlm.common.errors import OpdlmError
from opdlm.common.files import read_json
from opdlm.deploy.observe.tables import decoding_name, new_table

RETRIEVER = "retriever"
_RANKED = "recall@1", "recall@3", "recall@5", "ndcg@3", "ndcg@5", "reward"
_COUNTED = "valid", "copied", *FAILURES
COMPARED = "recall@1", "ndcg@3"
"""The metrics whose differences get an interval."""
_NAMES = {"recall@1": "R@1", "recall@3": "R@3", "recall@5": "R@5", "ndcg@3": "NDCG@3", "ndcg@5": "NDCG@5"}

Comparison = dict[str, str | float]


def rerank_figures(cases: Sequence[RerankCase], answers: Sequence[RerankAnswer]) -> dict[str, Any]:
    """The metrics, and the target's `ranks` by case, which two evaluations are compared by."""
    return {**rerank_metrics(cases, answers), "ranks": ranks(cases, answers).tolist()}


def rerank_comparisons(cases: Sequence[RerankCase], rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Comparison]:
    """By how much each order beats the retriever's and those of the rows above it, in each of `COMPARED`.

    Args:
        rows: (name, `rerank_figures`) of each way of decoding.

    Returns: `order`, `beside`, `metric`, the mean `difference`, and `low` and `high`, its 95 % interval by a paired
        bootstrap over the cases.
    """
    named, found = [_retriever(cases), *rows], list[Comparison]()
    for metric in COMPARED:
        values = [BY_RANK[metric](np.array(figures["ranks"])) for _, figures in named]
        for place, (name, _) in enumerate(named):
            for other in range(place):
                low, high = paired_interval(values[place], values[other])
                between: Comparison = {"order": name, "beside": named[other][0], "metric": metric}
                between["difference"] = float((values[place] - values[other]).mean())
                found.append(between | {"low": low, "high": high})
    return found


def rerank_tables(
    cases: Sequence[RerankCase], rows: Sequence[tuple[str, dict[str, Any]]], compared: Sequence[Comparison]
) -> list[Table]:
    """Three tables: the metrics, what became of the answers, and by how much each row beats the rows above it.

    Args:
        rows: (name, `rerank_figures`) of each way of decoding, the teacher's first where there is one.
        compared: `rerank_comparisons` of them.
    """
    metrics = new_table(f"re-ranking, {len(cases):,} cases", "order", *(_NAMES.get(n, n) for n in _RANKED))
    answers = new_table("its answers", "order", *_COUNTED)
    for name, figures in [_retriever(cases), *rows]:
        metrics.add_row(name, *(f"{figures[n]:.3f}" for n in _RANKED))
        answers.add_row(name, *(f"{figures[n]:.1%}" for n in _COUNTED))
    columns = [_NAMES[metric] for metric in COMPARED]
    differences = new_table("differences, and the 95 % interval of a paired bootstrap", "order", "beside", *columns)
    cells: dict[tuple[Any, Any], list[str]] = {}
    for one in compared:
        text = f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"
        cells.setdefault((one["order"], one["beside"]), []).append(text)
    for pair, texts in cells.items():
        differences.add_row(*pair, *texts)
    return [metrics, answers, differences]


def _retriever(cases: Sequence[RerankCase]) -> tuple[str, dict[str, Any]]:
    return RETRIEVER, rerank_figures(cases, [RerankAnswer(case.candidates) for case in cases])


def cases_digest(cases: Sequence[RerankCase]) -> str:
    """A fingerprint of the cases: evaluations with the same one can be compared case by case."""
    return hashlib.sha256(repr([(case.candidates, case.target) for case in cases]).encode()).hexdigest()[:16]


def read_beside(file: Path, cases: Sequence[RerankCase]) -> list[tuple[str, dict[str, Any]]]:
    """The rows of another evaluation of the same cases, with its checkpoint's name, for `rerank_tables`.

    Args:
        file: what `opdlm eval --output` wrote.

    Raises:
        OpdlmError: the file cannot be read, or has other cases.
    """
    found = read_json(file)
    try:
        digest, name = found["cases"], "/".join(Path(found["checkpoint"]).parts[-2:])
        ranked = [(f"{name}, {way}", figures) for way, figures in ranked_rows(found["rows"], found["threshold"])]
        complete = all({"ranks", *_RANKED, *_COUNTED} <= figures.keys() for _, figures in ranked)
    except (KeyError, TypeError, AttributeError):
        ranked, complete, digest = [], False, None
    if not (ranked and complete):
        raise OpdlmError(f"--beside: {file} is no result of `opdlm eval --output` with re-ranking cases")
    if digest != cases_digest(cases):
        raise OpdlmError(
            f"--beside: {file} has other cases than this evaluation; evaluate both with the same questions"
        )
    return ranked


def ranked_rows(rows: Sequence[dict[str, Any]], threshold: float) -> list[tuple[str, dict[str, Any]]]:
    """The name and the `rerank_figures` of each row of an evaluation. `threshold`: of its dynamic decoding."""
    return [(decoding_name(row["decoding"], threshold), row["rerank"]) for row in rows]
