"""`opdlm rerank-report`: re-rankers side by side, how good they are and how fast, as tables, PNG and JSON.

Quality is measured on all cases, speed on the first few of them, since a batch of one takes long. Speeds of one run of
this command can be compared with each other: the models take turns on one machine, with the same batch and dtype. An
autoregressive model is decoded by transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from opdlm.common.data.reranking import BY_RANK
from opdlm.common.errors import OpdlmError
from opdlm.common.model.facts import read_facts
from opdlm.common.types import RolloutRequest
from opdlm.deploy.evaluate.commands import Model, check_output, write_results
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.options import DecodingOptions, QuestionOptions, check_questions
from opdlm.deploy.evaluate.questions import Questions, open_questions
from opdlm.deploy.evaluate.reranked import RETRIEVER, rerank_comparisons, rerank_figures, rerank_tables
from opdlm.deploy.observe.meter import Meter
from opdlm.deploy.observe.tables import new_table


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """How speed is measured."""

    batches: Sequence[int]
    """Batch sizes."""
    cases: int
    """Number of cases, the first of the questions."""


def run_rerank_report(
    models: Sequence[Model],
    asked: QuestionOptions,
    thresholds: Sequence[float],
    speed: SpeedOptions,
    decoding: DecodingOptions,
    threads: int | None,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Measures the models in their order, prints the tables, writes `out` (JSON) and a PNG beside it.

    Args:
        thresholds: of dynamic decoding. The tables of quality show students at the largest one that is below 1.
        threads: CPU threads; None: as many as torch takes by itself.

    Raises:
        OpdlmError: a folder is no checkpoint, the questions are no re-ranking cases, or a file cannot be written.
    """
    if out.suffix != ".json":
        raise OpdlmError(f"--out: found {out}; expected a .json (the .png goes beside it)")
    for file in (out, out.with_suffix(".png")):
        check_output(file, "--out")
    check_questions(asked)
    if (most := max(speed.batches)) > speed.cases:
        raise OpdlmError(f"--batches: found {most} with --speed-cases {speed.cases}; a batch has no more than these")
    if decoding.actors:
        raise OpdlmError(f"--actors: found {decoding.actors}; speeds are measured in this process, so give 0")
    for name, folder in models:
        if name == RETRIEVER:
            raise OpdlmError(f"found the name {name!r}, which the tables have for the retriever's order; give another")
        read_facts(folder)  # what cannot be used is refused before anything is measured
    rows: list[dict[str, Any]] = []
    with _threads(threads), Meter(console) as meter:
        for name, folder in models:
            decoder = CheckpointDecoder(folder, dtype=decoding.dtype)
            questions = open_questions(asked, decoder)
            if not questions.cases:
                raise OpdlmError("rerank-report: the questions are no re-ranking cases; give --task rerank or --data")
            for threshold in thresholds if decoder.is_student else [None]:
                rows.append(_measured(name, decoder, questions, threshold, speed, decoding, meter))
    shown = max((t for t in thresholds if t < 1), default=max(thresholds))
    quality = [(row["name"], row["rerank"]) for row in rows if row["threshold"] in (None, shown)]
    compared = rerank_comparisons(questions.cases, quality)
    for table in (*rerank_tables(questions.cases, quality, compared), *_speed_tables(rows)):
        console.print(table)
    content = {"questions": questions.title, "quality_threshold": shown, "speed_cases": speed.cases}
    content["threads"] = threads or torch.get_num_threads()
    content |= {"rows": rows, "compared": compared}
    draw(rows, questions.title, out.with_suffix(".png"))
    console.print(f"written: {out.with_suffix('.png')}", highlight=False, soft_wrap=True)
    write_results(out, content, console)
    return content


def _measured(
    name: str,
    decoder: CheckpointDecoder,
    questions: Questions,
    threshold: float | None,
    speed: SpeedOptions,
    decoding: DecodingOptions,
    meter: Meter,
) -> dict[str, Any]:
    """One model, one threshold: its figures over all cases, and its speed with each batch size."""
    requests = questions.requests(decoding.max_new_tokens)
    decoder.check_room(requests)
    settings = decoder.base.greedy("low_confidence_dynamic")
    if threshold is not None:
        settings = replace(settings, threshold=threshold)
    title = name if threshold is None else f"{name}, threshold {threshold:g}"
    decoder.on_progress = meter
    meter.begin(title, len(requests))
    answers = decoder.answer(requests, settings, decoding.batch_size)
    row: dict[str, Any] = {"name": name, "threshold": threshold, "tokens_per_step": answers.tokens_per_step}
    row["rerank"] = rerank_figures(questions.cases, questions.mark(answers.responses).reranked)
    few: list[RolloutRequest] = list(requests[: speed.cases])
    row["speed"] = {}
    for batch in speed.batches:
        meter.begin(f"{title}, batch {batch}", len(few))
        decoder.answer(few[:batch], settings, batch)  # warms up
        timed = decoder.answer(few, settings, batch)
        row["speed"][str(batch)] = {
            "tokens_per_second": timed.tokens / timed.seconds,
            "milliseconds_per_request": 1e3 * timed.seconds / len(few),
        }
    return row


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch computes with this number of threads meanwhile; None changes nothing."""
    usual = torch.get_num_threads()
    torch.set_num_threads(count or usual)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def _speed_tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """For each batch size: tokens per second and milliseconds a request, beside the first autoregressive model."""
    beside = next((row for row in rows if row["threshold"] is None), None)
    for batch in rows[0]["speed"]:
        columns = "threshold", "R@1", "tokens per step", "tokens per second", "ms a request", "times AR"
        table = new_table(f"speed, batch {batch}", "model", *columns)
        for row in rows:
            speed = row["speed"][batch]
            times = speed["tokens_per_second"] / beside["speed"][batch]["tokens_per_second"] if beside else None
            table.add_row(
                row["name"],
                "-" if row["threshold"] is None else f"{row['threshold']:g}",
                f"{row['rerank']['recall@1']:.3f}",
                f"{row['tokens_per_step']:.2f}",
                f"{speed['tokens_per_second']:,.0f}",
                f"{speed['milliseconds_per_request']:.1f}",
                "-" if times is None else f"{times:.2f}",
            )
        yield table


def draw(rows: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Draws R@1 over tokens per second at the smallest batch: a line through each student's thresholds."""
    from opdlm.deploy.observe.figures import new_figure, save_figure

    figure, axis = new_figure(figsize=(7, 4.6))
    batch = next(iter(rows[0]["speed"]))
    for place, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        own = [row for row in rows if row["name"] == name]
        speeds = [row["speed"][batch]["tokens_per_second"] for row in own]
        recalls = [row["rerank"]["recall@1"] for row in own]
        errors = [1.96 * np.std(BY_RANK["recall@1"](np.array(row["rerank"]["ranks"]))) for row in own]
        counts = [len(row["rerank"]["ranks"]) for row in own]
        bars = [error / np.sqrt(count) for error, count in zip(errors, counts, strict=True)]
        axis.errorbar(speeds, recalls, yerr=bars, marker="o", capsize=2, color=f"C{place}", label=name)
        for row, x, y in zip(own, speeds, recalls, strict=True):
            if row["threshold"] is not None:
                axis.annotate(f"{row['threshold']:g}", (x, y), (4, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel=f"tokens per second, batch {batch}", ylabel="R@1 (bars: 95 %)", xlim=(0, None), title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, file)
