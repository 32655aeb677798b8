"""The re-ranking tables of `opdlm eval`: metrics beside the retriever, and differences (METHOD.md section 10)."""

from __future__ import annotations

from collections.abc import Sequence
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
from opdlm.deploy.observe.tables import new_table

RETRIEVER = "retriever"
_SHOWN = "recall@1", "recall@3", "ndcg@3", "reward", "valid", "copied", *FAILURES
_NAMES = {"recall@1": "R@1", "recall@3": "R@3", "ndcg@3": "NDCG@3"}


def rerank_figures(cases: Sequence[RerankCase], answers: Sequence[RerankAnswer]) -> dict[str, Any]:
    """The metrics, and the target's `ranks` by case, which two evaluations are compared by."""
    return {**rerank_metrics(cases, answers), "ranks": ranks(cases, answers).tolist()}


def rerank_tables(cases: Sequence[RerankCase], rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Table]:
    """Two tables: the metrics, and by how much each row beats the rows above it.

    Args:
        rows: (name, `rerank_figures`) of each way of decoding, the teacher's first where there is one.
    """
    of_retriever = rerank_figures(cases, [RerankAnswer(case.candidates) for case in cases])
    named = [(RETRIEVER, of_retriever), *rows]
    metrics = new_table(f"re-ranking, {len(cases):,} cases", "order", *(_NAMES.get(n, n) for n in _SHOWN))
    for name, figures in named:
        shown = [f"{figures[n]:.3f}" if n in _NAMES or n == "reward" else f"{figures[n]:.1%}" for n in _SHOWN]
        metrics.add_row(name, *shown)
    differences = new_table("R@1: difference, 95 % interval of a paired bootstrap", "order", "beside", "by", "interval")
    for place, (name, figures) in enumerate(named):
        for other, theirs in named[:place]:
            mine, beside = (BY_RANK["recall@1"](np.array(of["ranks"])) for of in (figures, theirs))
            low, high = paired_interval(mine, beside)
            differences.add_row(name, other, f"{(mine - beside).mean():+.3f}", f"{low:+.3f} to {high:+.3f}")
    return [metrics, differences]
