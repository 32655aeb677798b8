"""`opdlm sweep`: what decoding in parallel costs in accuracy (the paper's figure 3), as table, PNG and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.config.base import WITH_THRESHOLD
from opdlm.common.config.schema import Strategy
from opdlm.common.errors import OpdlmError
from opdlm.common.model.facts import read_facts
from opdlm.deploy.evaluate.commands import Model, check_output, open_decoder, tell_unknown, write_results
from opdlm.deploy.evaluate.decoders import Decoder
from opdlm.deploy.evaluate.options import DecodingOptions, QuestionOptions, check_actors, check_questions
from opdlm.deploy.evaluate.questions import Questions, open_questions
from opdlm.deploy.observe.meter import Meter
from opdlm.deploy.observe.tables import decoding_name, new_table


@dataclass(frozen=True, slots=True)
class Way:
    """One way of decoding a checkpoint."""

    block_size: int | None = None
    """None for an autoregressive model, as the others."""
    strategy: Strategy | None = None
    threshold: float | None = None
    """None where the strategy has none."""

    @property
    def decoding(self) -> str:
        """Such as `dynamic 0.9`."""
        return decoding_name(self.strategy or "autoregressive", self.threshold)

    @property
    def name(self) -> str:
        """Such as `block 4, dynamic 0.9`."""
        return self.decoding if self.block_size is None else f"block {self.block_size}, {self.decoding}"

    def settings(self, base: DecodeSettings) -> DecodeSettings:
        """The decoder's own settings, changed to this way."""
        if self.strategy is None or self.block_size is None:
            return base
        settings = replace(base.greedy(self.strategy), block_size=self.block_size)
        return settings if self.threshold is None else replace(settings, threshold=self.threshold)


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One way of decoding a checkpoint and its figures."""

    checkpoint: str
    """Its name in table and plot."""
    way: Way
    right: float
    """Share of right answers."""
    unanswered: int
    """Responses in which no answer was found."""
    tokens_per_step: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """The ways of decoding students; an autoregressive model has one way only."""

    strategies: Sequence[Strategy]
    """Empty: dynamic, and `verified` for a lossless student."""
    thresholds: Sequence[float]
    """Of the dynamic strategies."""
    block_sizes: Sequence[int] | None
    """None: each checkpoint's own."""

    def ways(self, decoder: Decoder) -> Iterator[Way]:
        """All ways in which a checkpoint is decoded."""
        if not decoder.is_student:
            yield Way()
            return
        for block in self.block_sizes or [decoder.base.block_size]:
            for strategy in self.strategies or decoder.facts.usual_strategies[-1:]:
                for threshold in self.thresholds if strategy in WITH_THRESHOLD else [None]:
                    yield Way(block, strategy, threshold)


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
    models: Sequence[Model],
    asked: QuestionOptions,
    options: SweepOptions,
    decoding: DecodingOptions,
    out: Path | None,
    console: Console,
) -> list[SweepPoint]:
    """Decodes the questions in every way, prints the table, writes a plot (`out`, PNG) and a JSON file beside it.

    Args:
        out: None: `sweep.png` beside the first model's folder.

    Raises:
        OpdlmError: no model is a student, or a folder, the questions or a file cannot be used.
    """
    picture = out or models[0][1].resolve().parent / "sweep.png"
    if picture.suffix != ".png":
        raise OpdlmError(f"--out: found {picture}; expected a .png (the .json goes beside it)")
    for file in (picture, picture.with_suffix(".json")):
        check_output(file, "--out")
    check_questions(asked)
    check_actors(decoding)
    are_students = [read_facts(folder).is_student for _, folder in models]
    if not any(are_students):
        found = f"{models[0][1]} is autoregressive" if len(models) == 1 else "all models are autoregressive"
        raise OpdlmError(f"sweep: {found}; it takes a student to have blocks and thresholds (opdlm eval)")
    points: list[SweepPoint] = []
    checkpoints: dict[str, dict[str, Any]] = {}
    for name, folder in models:
        with open_decoder(folder, decoding) as decoder:
            questions = open_questions(asked, decoder)
            tell_unknown(questions, console)
            points += _points(name, decoder, questions, options, decoding, console)
            facts, base = decoder.facts, decoder.base
        checkpoints[name] = {"folder": str(folder)}
        if facts.is_student:
            checkpoints[name] |= {"block_grid": base.block_grid, "trained_block_size": facts.block_size}
    title = questions.title if len(models) > 1 else f"{models[0][1]}: {questions.title}"
    console.print(_table(title, questions.figure, points))
    content: dict[str, Any] = {"checkpoints": checkpoints, "questions": questions.title, "figure": questions.figure}
    content |= {"max_new_tokens": decoding.max_new_tokens, "points": [_as_row(point) for point in points]}
    draw(points, title if len(models) > 1 else f"{models[0][1].name}: {questions.title}", questions.figure, picture)
    console.print(f"written: {picture}", highlight=False, soft_wrap=True)
    write_results(picture.with_suffix(".json"), content, console)
    return points


def _points(
    name: str,
    decoder: Decoder,
    questions: Questions,
    options: SweepOptions,
    decoding: DecodingOptions,
    console: Console,
) -> Iterator[SweepPoint]:
    """The figures of one checkpoint, in every way."""
    ways = list(options.ways(decoder))
    requests = questions.requests(decoding.max_new_tokens)
    for way in ways:
        decoder.check_room(requests, way.block_size)
    with Meter(console) as meter:
        decoder.on_progress = meter
        for number, way in enumerate(ways, start=1):
            meter.begin(f"{name} [{number}/{len(ways)}] {way.name}", len(requests))
            answers = decoder.answer(requests, way.settings(decoder.base), decoding.batch_size)
            marks, speed = questions.mark(answers.responses), answers.tokens / answers.seconds
            yield SweepPoint(name, way, marks.right, marks.unanswered, answers.tokens_per_step, speed)


def _as_row(point: SweepPoint) -> dict[str, Any]:
    row = asdict(point)
    return row | row.pop("way")


def draw(points: Sequence[SweepPoint], title: str, figure_name: str, file: Path) -> None:
    """Draws accuracy over tokens per step: a line through the thresholds of a dynamic strategy, else a mark."""
    from matplotlib import ticker

    from opdlm.deploy.observe.figures import new_figure, save_figure

    figure, axis = new_figure(figsize=(7, 4.6))
    several = len({point.checkpoint for point in points}) > 1
    others = list(dict.fromkeys(point.way.strategy for point in points if point.way.threshold is None))
    series: dict[tuple[str, int | None], list[SweepPoint]] = {}
    for point in points:
        series.setdefault((point.checkpoint, point.way.block_size), []).append(point)
    for place, ((name, block), own) in enumerate(series.items()):
        of, color = f"{name}, " if several else "", f"C{place}"
        for strategy, style in zip(WITH_THRESHOLD, ("-", "--"), strict=True):
            line = sorted((p for p in own if p.way.strategy == strategy), key=lambda p: p.way.threshold or 0.0)
            if line:
                at = [p.tokens_per_step for p in line], [p.right for p in line]
                label = f"{of}block {block}, {decoding_name(strategy)}"
                axis.plot(*at, style, marker="o", color=color, label=label)
            for i, point in enumerate(line):
                # Curves fall: on either side of one there is room, and neighbours may be closer than a label is wide.
                offset, side = ((6, 4), "left") if i % 2 == 0 else ((-6, -10), "right")
                how = {"textcoords": "offset points", "ha": side, "fontsize": 8, "color": color}
                axis.annotate(f"{point.way.threshold:g}", (point.tokens_per_step, point.right), offset, **how)
        for point in (p for p in own if p.way.threshold is None):
            sign = "sD^v*P"[others.index(point.way.strategy)]
            at_point = point.tokens_per_step, point.right
            axis.plot(*at_point, sign, color=color, mfc="none", label=f"{of}{point.way.name}")
    axis.margins(y=0.15)
    axis.set(xlabel="tokens per forward", ylabel=figure_name, xlim=(0, None), title=title)
    axis.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=None))
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, file)


def _table(title: str, figure: str, points: Sequence[SweepPoint]) -> Table:
    several = len({point.checkpoint for point in points}) > 1
    table = new_table(title, "decoding", "block size", figure, "tokens per denoising step", "tokens per second")
    for p in points:
        figures = f"{p.right:.1%}", f"{p.tokens_per_step:.2f}", f"{p.tokens_per_second:,.0f}"
        name = f"{p.checkpoint}, {p.way.decoding}" if several else p.way.decoding
        table.add_row(name, "-" if p.way.block_size is None else str(p.way.block_size), *figures)
    return table
