"""The live view of a run: a table that is redrawn in place, or plain lines where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from opdlm.deploy.observe.outlook import duration_text, gpu_hours_text

_PLAIN_EVERY_SECONDS = 5.0
_PROGRESS_EVERY_SECONDS = 10.0


class View(Protocol):
    """Shows records to the user while the run goes on."""

    def show(self, record: dict[str, Any]) -> None:
        """Takes one record."""
        ...


class LiveView:
    """A table of the newest figures, redrawn at most four times per second. `clock`: seconds that only grow."""

    def __init__(
        self, console: Console, rounds: int, first_round: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._latest: dict[str, dict[str, Any]] = {}
        self._progress = Progress(
            TextColumn("round"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._task = self._progress.add_task("rounds", total=rounds, completed=first_round, left="")
        self._clock, self._shown = clock, 0.0
        """When the newest round was shown."""
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def show(self, record: dict[str, Any]) -> None:
        """Shows a record in place of the one of its kind before."""
        key = f"evaluation {record['row']}" if record["kind"] == "evaluation" else record["kind"]
        self._latest[key] = record
        if record["kind"] == "round":
            self._shown = self._clock()
            self._progress.update(self._task, completed=record["round"])
        elif line := warning_line(record):
            self.live.console.print(line, soft_wrap=True, highlight=False)  # stays above the table

    def _render(self) -> Group:
        step, round_ = self._latest.get("step", {}), self._latest.get("round", {})
        still = left_text(round_, self._clock() - self._shown)
        self._progress.update(self._task, left=f"left {still}" if still else "")
        table = Table(box=None, show_header=False, pad_edge=False)
        for left, right in zip(_training_figures(step, round_), _throughput_figures(round_), strict=True):
            table.add_row(*left, "   ", *right)
        if spent := gpu_hours_text(round_):
            table.add_row("GPU-hours", spent)
        for record in self._latest.values():
            if record["kind"] == "evaluation":
                name, exact = f"{record['row']}, round {record['round']}", f"{record['exact_match']:.1%}"
                table.add_row(name, exact, "", "tokens/step", f"{record['tokens_per_step']:.2f}")
        lines = progress_lines(self._latest["progress"]) if "progress" in self._latest else []
        return Group(self._progress, table, *(Text(line) for line in lines))


class PlainView:
    """Prints one line per round (at most one every few seconds), per evaluation and per warning.

    Where a round takes longer, it prints every ten seconds how far the round is.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, console: Console, rounds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._rounds, self._clock = console, rounds, clock
        self._loss = float("nan")
        self._last = self._shown = clock()
        """When the last line about rounds was printed, and when the newest round was shown."""
        self._round: dict[str, Any] = {}

    def show(self, record: dict[str, Any]) -> None:
        """Prints a line about a record, or only remembers its loss."""
        if record["kind"] == "step":
            self._loss = record["loss"]
        elif line := warning_line(record):
            self._print(line)
        elif record["kind"] == "progress":
            if self._clock() - self._last >= _PROGRESS_EVERY_SECONDS:
                self._last = self._clock()
                *tasks, made = progress_lines(record) if "stages" in record else [*progress_lines(record), ""]
                more = outlook_text(self._round, self._last - self._shown)
                for line in (*tasks, f"{made} | {more}" if made and more else made):
                    if line:
                        self._print(line)
        elif record["kind"] == "evaluation":
            self._print(
                f"evaluation of round {record['round']}, {record['row']}: exact match {record['exact_match']:.1%}, "
                f"{record['tokens_per_step']:.2f} tokens/step, {record['tokens_per_second']:.0f} tokens/s"
                + (", the best so far" if "best_by" in record else "")
            )
        elif record["kind"] == "round":
            self._round, self._shown = record, self._clock()
            last = record["round"] == self._rounds
            if last or self._clock() - self._last > _PLAIN_EVERY_SECONDS:
                self._last = self._clock()
                more = outlook_text(record, 0.0)
                speeds = " ".join(
                    f"{role} {_number(record, f'{role}_tokens_per_second', '{:.0f}')}"
                    for role in ("rollout", "teacher", "learner", "run")
                )
                self._print(
                    f"round {record['round']}/{self._rounds} step {record['step']} loss {self._loss:.4f} "
                    f"tokens/step {_number(record, 'tokens_per_step', '{:.2f}')} | tokens/s {speeds} | "
                    f"queue {record['queue_depth']} staleness {record['staleness_mean']:.1f} "
                    f"version {record['weight_version']}" + (f" | {more}" if more else "")
                )

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False)


@contextmanager
def open_view(console: Console, rounds: int, first_round: int) -> Iterator[LiveView | PlainView]:
    """A live table where the console is a terminal, otherwise plain lines."""
    if not console.is_terminal:
        yield PlainView(console, rounds)
        return
    view = LiveView(console, rounds, first_round)
    with view.live:
        yield view


def left_text(round_: dict[str, Any], since: float) -> str:
    """How long the run still takes, `since` seconds after the record of its newest round; empty while unknown."""
    left = round_.get("time_left_seconds")
    return f"about {duration_text(max(left - since, 0))}" if left else ""


def outlook_text(round_: dict[str, Any], since: float) -> str:
    """Time left and GPU-hours: `left about 2 h 05 min | GPU-hours 3.2 of about 20.1`; empty while unknown."""
    left, spent = left_text(round_, since), gpu_hours_text(round_)
    return " | ".join([*([f"left {left}"] if left else []), *([f"GPU-hours {spent}"] if spent else [])])


def warning_line(record: dict[str, Any]) -> str | None:
    """A line about what went wrong without ending the run, or why it ends early; None for other records."""
    if record["kind"] == "skipped_step":
        how_often = f" ({record['in_a_row']} in a row)" if record["in_a_row"] else ""
        return f"step {record['step']} skipped: {record['reason']}{how_often}"
    if record["kind"] == "actor_death":
        return f"{record['actor']} died: {record['reason']}"
    if record["kind"] == "queue_death":
        return f"replay-queue died: {record['reason']}; going back to the last checkpoint"
    if record["kind"] == "damaged_checkpoint":
        return str(record["reason"])
    if record["kind"] == "learner_restart":
        again = f"{record['lost_steps']} optimizer steps are done again"
        return f"the learner begins again after round {record['round']}; {again}"
    if record["kind"] == "early_stop":
        return f"training ends early: {record['reason']}"
    if record["kind"] == "failed_save":
        return f"checkpoint of round {record['round']} not written ({record['in_a_row']} in a row): {record['reason']}"
    return None


def progress_lines(record: dict[str, Any]) -> list[str]:
    """How far a run is (`deploy/observe/progress.py`): a line for each task, and one for the round.

    Example: `round 3/40: decoded 96 of 128 (0.8/s, 410 tokens/s), scored 32 of 128 (1.1/s), optimizer steps 0 of 16`
    """
    lines = [f"{task['name']}: {_amount(task)}" for task in record["tasks"]]
    if "stages" in record:
        stages = ", ".join(f"{stage['name']} {_amount(stage)}" for stage in record["stages"])
        lines.append(f"round {record['round']}/{record['rounds']}: {stages or 'the learner starts'}")
    return lines


def _amount(part: dict[str, Any]) -> str:
    rates = [f"{rate_text(part['per_second'])}/s"] if part["per_second"] else []
    rates += [f"{rate_text(part['tokens_per_second'])} tokens/s"] if part.get("tokens_per_second") else []
    more = [", ".join(rates)] if rates else []
    more += [f"{part['ahead']:,} ahead"] if part.get("ahead") else []
    return f"{part['done']:,} of {part['total']:,}" + (f" ({'; '.join(more)})" if more else "")


def rate_text(rate: float) -> str:
    """A rate with two digits below 10, else as a whole number."""
    return f"{rate:.2g}" if rate < 10 else f"{rate:,.0f}"


def _training_figures(step: dict[str, Any], round_: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("optimizer step", _number(step, "step", "{:,d}")),
        ("loss", _number(step, "loss", "{:.4f}")),
        ("gradient norm", _number(step, "grad_norm", "{:.3f}")),
        ("learning rate", _number(step, "learning_rate", "{:.2e}")),
        ("tokens per step", _number(round_, "tokens_per_step", "{:.2f}")),
        ("rollout tokens", _number(round_, "rollout_tokens", "{:,d}")),
    ]


def _throughput_figures(round_: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("rollout tokens/s", _number(round_, "rollout_tokens_per_second", "{:,.0f}")),
        ("teacher tokens/s", _number(round_, "teacher_tokens_per_second", "{:,.0f}")),
        ("learner tokens/s", _number(round_, "learner_tokens_per_second", "{:,.0f}")),
        ("queue depth", _number(round_, "queue_depth", "{:,d}")),
        ("staleness", _number(round_, "staleness_mean", "{:.1f}")),
        ("weight version", _number(round_, "weight_version", "{:,d}")),
    ]


def _number(record: dict[str, Any], name: str, form: str) -> str:
    return form.format(record[name]) if name in record else "-"
