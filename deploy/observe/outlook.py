"""How long a run still takes, and its GPU-hours: spent, and expected at its end. Estimated from its rounds so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from opdlm.common.config import OpdlmConfig
from opdlm.common.curriculum import length_limit

_WINDOW = 8
"""Newest rounds that count; more where checkpoints or evaluations come less often, for each of them takes time."""
_BEFORE_ROUNDS = ("data", "offline", "publish", "evaluation")
"""Kinds of records that may come before the first round of a process has begun."""

_BESIDE = "student"
"""Row of the evaluations that spare actors make beside the rounds (`PERIODIC` in report.py, which needs this file)."""


@dataclass(frozen=True, slots=True)
class _Round:
    seconds: float
    number: int
    """From 0."""
    tokens: float | None
    """Mean response, in tokens; None where nothing was decoded."""
    at_limit: float
    """Share of the responses that the length limit ended."""


class Outlook:
    """Follows the records of a run, also those before a resume.

    Args:
        rounds: of the run.
        earlier: records of the run so far.
    """

    def __init__(self, config: OpdlmConfig, rounds: int, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        self._config, self._rounds = config, rounds
        every = (config.checkpoint.every_rounds, config.evaluation.every_rounds or 0)
        self._measured: deque[_Round] = deque(maxlen=max(_WINDOW, *every))
        self.done = 0
        """Rounds trained."""
        self.gpu_hours = 0.0
        """GPUs that were reserved times their time, to the end of the last round; rounds that are lost do not count."""
        self._began = self._counted = 0.0
        """Seconds of the run at which the round began, and up to which `gpu_hours` counts."""
        self._first = True
        """Whether the round is the first one of its process."""
        for record in earlier:
            self.note(record)
            self.gpu_hours = record.get("gpu_hours", self.gpu_hours)

    def note(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Takes a record. Returns the figures that a `round` record gets, and nothing for others.

        `time_left_seconds`: of the rounds that are left. With GPUs `gpus_reserved`, `gpu_hours` (spent) and
        `gpu_hours_expected` (at the end of the last round).
        """
        seconds = record["wall_seconds"]
        if record["kind"] == "data":
            self._first = True
        beside = record.get("row") == _BESIDE and self._config.evaluation.actors > 0
        if self._first and record["kind"] in _BEFORE_ROUNDS and not beside:
            self._began = seconds
        if record["kind"] != "round":
            return {}
        self._note_round(record)
        self.done = record["round"]
        left = self.seconds_left
        figures = {} if left is None else {"time_left_seconds": left}
        gpus = gpus_reserved(self._config, record)
        self.gpu_hours += gpus * max(seconds - self._counted, 0) / 3600
        self._counted = seconds
        if self.gpu_hours:
            figures |= {"gpus_reserved": gpus, "gpu_hours": self.gpu_hours}
            figures |= {} if left is None else {"gpu_hours_expected": self.gpu_hours + gpus * left / 3600}
        return figures

    def _note_round(self, record: Mapping[str, Any]) -> None:
        seconds, number = record["wall_seconds"], record["round"] - 1
        while self._measured and self._measured[-1].number >= number:  # it is trained again
            self._measured.pop()
        tokens, at_limit = record.get("response_tokens_mean"), record.get("ended_by_limit_share", 0.0)
        self._measured.append(_Round(max(seconds - self._began, 0), number, tokens, at_limit))
        self._began, self._first = seconds, False

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rounds which are left take; None while no round was measured.

        A round takes as long as the mean of the newest ones. Where `curriculum.max_new_tokens` lets responses grow, it
        takes longer in proportion to them: a limit that rises by one token makes the responses longer that it ended
        before, so their mean grows by their share. Fewer reach a higher limit, so this is rather too much than too
        little, and each round corrects it.
        """
        if not self._measured:
            return None
        mean = sum(r.seconds for r in self._measured) / len(self._measured)
        left = range(self.done, self._rounds)
        tokens = [r.tokens for r in self._measured if r.tokens]
        if self._config.curriculum.max_new_tokens is None or len(tokens) < len(self._measured):
            return mean * len(left)
        last = self._measured[-1]
        mean_tokens, limit = sum(tokens) / len(tokens), length_limit(self._config, last.number)
        grown = (tokens[-1] + last.at_limit * (length_limit(self._config, r) - limit) for r in left)
        return sum(mean * max(each, 1.0) / mean_tokens for each in grown)


def gpus_reserved(config: OpdlmConfig, sizes: Mapping[str, Any]) -> float:
    """GPUs that Ray has reserved for a run. `sizes`: may have the present numbers of actors, as a `round` record."""
    learner, rollout, teacher = config.learner, config.rollout, config.teacher
    gpus = learner.workers * learner.gpus_per_worker
    if config.run.replay is not None:
        return gpus
    students = sizes.get("rollout_actors", rollout.actors) + config.evaluation.actors + config.reference_actors
    teachers = sizes.get("teacher_actors", teacher.actors if config.starts_teachers else 0)
    return gpus + students * rollout.gpus_per_actor + teachers * teacher.gpus_per_actor


def time_lines(config: OpdlmConfig, rounds: int, earlier: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """For the plan, by topic: how long the run still takes, as far as its rounds so far tell, and its GPU-hours.

    Args:
        rounds: of the run.
        earlier: its records so far.
    """
    outlook, gpus, minutes = Outlook(config, rounds, earlier), gpus_reserved(config, {}), config.run.max_minutes
    left = outlook.seconds_left
    took = "the first round" if outlook.done == 1 else f"the {outlook.done:,} rounds so far"
    known = f"about {duration_text(left)}, as {took} took" if left is not None else None
    lines = {"time left": known or "not known before the first round; the run shows it then"}
    if minutes is not None:
        lines["part"] = f"ends after the round in which {minutes:g} minutes are over; --resume goes on"
    if gpus and left is not None:
        spent = outlook.gpu_hours
        lines["GPU-hours"] = f"{spent:.1f} spent, about {spent + gpus * left / 3600:.1f} at the end"
    elif gpus:
        part = f", about {gpus * minutes / 60:.1f} in a part" if minutes is not None else ""
        lines["GPU-hours"] = f"{gpus:g} for each hour{part}"
    return lines


def duration_text(seconds: float) -> str:
    """A duration in one or two units: `45 s`, `12 min`, `2 h 05 min`, `3 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def gpu_hours_text(record: Mapping[str, Any]) -> str | None:
    """The GPU-hours of a `round` record: `3.2 of about 20.1`; None for a run without GPUs."""
    if "gpu_hours" not in record:
        return None
    expected = f" of about {record['gpu_hours_expected']:.1f}" if "gpu_hours_expected" in record else ""
    return f"{record['gpu_hours']:.1f}{expected}"
