"""`opdlm sweep`: what decoding in parallel costs in accuracy (the paper's figure 3), as table, PNG and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opdlm.common.config.schema import Strategy
from opdlm.common.errors import OpdlmError
from opdlm.deploy.evaluate.commands import check_output, open_decoder, tell_unknown, write_results
from opdlm.deploy.evaluate.decoders import Decoder
from opdlm.deploy.evaluate.options import DecodingOptions, QuestionOptions, check_questions
from opdlm.deploy.evaluate.questions import Questions, open_questions
from opdlm.deploy.observe.meter import Meter
from opdlm.deploy.observe.tables import decoding_name, new_table

_DYNAMIC: Strategy = "low_confidence_dynamic"


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One way of decoding and its figures."""

    block_size: int
    strategy: Strategy
    threshold: float | None
    """None where the strategy has none."""
    right: float
    """Share of right answers."""
    unanswered: int
    """Responses in which no answer was found."""
    tokens_per_step: float
    tokens_per_second: float


def numbers(text: str, kind: type[int] | type[float], flag: str, least: float, most: float) -> list[Any]:
    """The numbers in a text such as `0.5,0.9`, in rising order, each once; an `OpdlmError` names the flag."""
    try:
        values = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        raise OpdlmError(
            f"{flag}: found {text!r}; expected numbers with commas between, as {least:g},{most:g}"
        ) from None
    if not all(least <= value <= most for value in values):  # also what is not a number
        raise OpdlmError(f"{flag}: found {text!r}; each has to lie within {least:g} and {most:g}")
    return values


def run_sweep(
    folder: Path,
    asked: QuestionOptions,
    strategies: Sequence[Strategy],
    thresholds: Sequence[float],
    block_sizes: Sequence[int] | None,
    decoding: DecodingOptions,
    out: Path | None,
    console: Console,
) -> list[SweepPoint]:
    """Decodes the questions in every way, prints the table, writes a plot (`out`, PNG) and a JSON file beside it."""
    picture = out or folder.resolve().parent / "sweep.png"
    if picture.suffix != ".png":
        raise OpdlmError(f"--out: found {picture}; expected a .png (the .json goes beside it)")
    for file in (picture, picture.with_suffix(".json")):
        check_output(file, "--out")
    check_questions(asked)
    with open_decoder(folder, decoding) as decoder:
        if not decoder.is_student:
            raise OpdlmError(f"sweep: {folder} is autoregressive; it has neither blocks nor thresholds (opdlm eval)")
        blocks = block_sizes or [decoder.base.block_size]
        ways = [
            (block, strategy, threshold)
            for block in blocks
            for strategy in strategies
            for threshold in (thresholds if strategy == _DYNAMIC else [None])
        ]
        questions = open_questions(asked, decoder)
        tell_unknown(questions, console)
        requests = questions.requests(decoding.max_new_tokens)
        for block in blocks:
            decoder.check_room(requests, block)
        points = []
        with Meter(console) as meter:
            decoder.on_progress = meter
            for number, (block, strategy, threshold) in enumerate(ways, start=1):
                meter.begin(f"[{number}/{len(ways)}] {_name(block, strategy, threshold)}", len(requests))
                points.append(_point(decoder, questions, requests, decoding, block, strategy, threshold))
    console.print(_table(f"{folder}: {questions.title}", questions.figure, points))
    content = {
        "checkpoint": str(folder),
        "questions": questions.title,
        "figure": questions.figure,
        "block_grid": decoder.base.block_grid,
        "trained_block_size": decoder.facts.block_size,
        "max_new_tokens": decoding.max_new_tokens,
        "points": [asdict(point) for point in points],
    }
    draw(points, f"{folder.name}: {questions.title}", questions.figure, picture)
    console.print(f"written: {picture}", highlight=False, soft_wrap=True)
    write_results(picture.with_suffix(".json"), content, console)
    return points


def _point(
    decoder: Decoder,
    questions: Questions,
    requests: list[Any],
    decoding: DecodingOptions,
    block: int,
    strategy: Strategy,
    threshold: float | None,
) -> SweepPoint:
    settings = replace(decoder.base.greedy(strategy), block_size=block)
    if threshold is not None:
        settings = replace(settings, threshold=threshold)
    answers = decoder.answer(requests, settings, decoding.batch_size)
    marks = questions.mark(answers.responses)
    speed = answers.tokens / answers.seconds
    return SweepPoint(block, strategy, threshold, marks.right, marks.unanswered, answers.tokens_per_step, speed)


def draw(points: Sequence[SweepPoint], title: str, figure_name: str, file: Path) -> None:
    """Draws accuracy over tokens per step: a line per block size through its thresholds, a mark per other strategy."""
    from matplotlib import ticker

    from opdlm.deploy.observe.figures import new_figure, save_figure

    figure, axis = new_figure(figsize=(7, 4.6))
    others = sorted({point.strategy for point in points} - {_DYNAMIC})
    for place, block in enumerate(sorted({point.block_size for point in points})):
        line = sorted((p for p in points if (p.block_size, p.strategy) == (block, _DYNAMIC)), key=_threshold)
        at = [p.tokens_per_step for p in line], [p.right for p in line]
        if line:
            axis.plot(*at, marker="o", color=f"C{place}", label=f"block {block}, dynamic")
        for i, point in enumerate(line):
            offset = (0, 7) if i % 2 == 0 else (0, -14)  # neighbours may be closer to each other than a label is wide
            where, label = (point.tokens_per_step, point.right), f"{point.threshold:g}"
            how = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": f"C{place}"}
            axis.annotate(label, where, offset, **how)
        for sign, strategy in zip("sD^v", others, strict=False):
            for point in (p for p in points if (p.block_size, p.strategy) == (block, strategy)):
                name = f"block {block}, {decoding_name(strategy)}"
                axis.plot(point.tokens_per_step, point.right, sign, color=f"C{place}", mfc="none", label=name)
    axis.margins(y=0.15)
    axis.set(xlabel="tokens per denoising step", ylabel=figure_name, xlim=(0, None), title=title)
    axis.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=None))
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, file)


def _threshold(point: SweepPoint) -> float:
    return point.threshold or 0.0


def _table(title: str, figure: str, points: Sequence[SweepPoint]) -> Table:
    table = new_table(title, "decoding", "block size", figure, "tokens per denoising step", "tokens per second")
    for p in points:
        figures = f"{p.right:.1%}", f"{p.tokens_per_step:.2f}", f"{p.tokens_per_second:,.0f}"
        table.add_row(decoding_name(p.strategy, p.threshold), str(p.block_size), *figures)
    return table


def _name(block: int, strategy: Strategy, threshold: float | None) -> str:
    return f"block {block}, {decoding_name(strategy, threshold)}"
