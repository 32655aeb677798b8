"""The best student of a run, by a figure of its evaluations during training, and when training should end early.

    RUN/best/round-000030/    the student of version 30 as a model folder

What a resumed run needs is in the records of the evaluations: their figures, and `best_by` where the weights were kept.
A resumed run goes back to a checkpoint, so the best student as of each checkpoint stays until the end of the run, too.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opdlm.common.checkpoint import list_checkpoints
from opdlm.common.config.schema import KeepBestConfig
from opdlm.common.errors import ConfigError
from opdlm.deploy.observe.report import PERIODIC, best_folder, figure_of

_OF_ALL = ("exact_match", "tokens_per_step")
"""Figures of `EvaluationResult` that tell of the student alone, not of the machine."""
_OF_TASK = ("exact_match", "token_match", "tokens_per_step")
"""Figures of each task in `EvaluationResult.by_task`."""


_BESIDE_TEACHER = ("of_teacher", "agreement", "token_agreement", "held_out_kl")
"""Figures about the questions of `evaluation.data` that a run has only if it starts teacher actors."""


def best_figures(tasks: Sequence[str], kinds: Sequence[str] | None = None, has_teacher: bool = True) -> list[str]:
    """Names of the figures by which a run can keep its best student.

    Args:
        tasks: that it evaluates on.
        kinds: of the questions of `evaluation.data`; None: there are none.
        has_teacher: whether the run starts teacher actors, which answer the questions too.
    """
    found = [*_OF_ALL, *(f"{task}/{figure}" for task in tasks for figure in _OF_TASK)]
    if kinds is None:
        return found
    return [*found, "data_right", *(_BESIDE_TEACHER if has_teacher else ()), *(f"{kind}/right" for kind in kinds)]


def check_best_figure(
    settings: KeepBestConfig | None, tasks: Sequence[str], kinds: Sequence[str] | None = None, has_teacher: bool = True
) -> None:
    """Raises `ConfigError`, with the figures that there are, if the evaluations have none of the configured name.

    `tasks`, `kinds`, `has_teacher`: as for `best_figures`.
    """
    known = best_figures(tasks, kinds, has_teacher)
    if settings is not None and settings.figure not in known:
        raise ConfigError(
            f"checkpoint.keep_best.figure: found {settings.figure!r}; this run's evaluations have {', '.join(known)}"
        )


class BestStudent:
    """Compares the evaluations of a run in the order of their versions, and names the folder of the best student.

    Args:
        run_dir: the run directory.
        settings: `checkpoint.keep_best`.
    """

    def __init__(self, run_dir: Path, settings: KeepBestConfig) -> None:
        self.settings = settings
        self.label = f"{settings.mode} {settings.figure}"
        """`best_by` of the evaluations whose students are kept."""
        self._run_dir = run_dir
        self._sign = 1.0 if settings.mode == "max" else -1.0
        self._values: list[float] = []
        """The figure in each evaluation so far."""
        self._kept: list[tuple[int, float]] = []
        """(version, figure) of each student that was the best when it came, and whose folder is there."""

    def restore(self, records: Iterable[Mapping[str, Any]]) -> str | None:
        """Goes on after the evaluations in the records. Returns what the user should know of lost students, or None."""
        earlier = sorted((r for r in records if r.get("row") == PERIODIC), key=lambda record: record["round"])
        self._values = [figure_of(record, self.settings.figure) for record in earlier if self._has_figure(record)]
        kept = [record for record in earlier if record.get("best_by") == self.label]
        there = [record for record in kept if self.folder(record["round"]).is_dir()]
        self._kept = [(record["round"], figure_of(record, self.settings.figure)) for record in there]
        self.prune()
        if not earlier or (kept[-1:] and there[-1:] == kept[-1:]):
            return None
        lost = f"{self.folder(kept[-1]['round'])} is gone" if kept else f"no student was kept by {self.label} so far"
        return f"checkpoint.keep_best: {lost}; the best is chosen among those that are kept and those to come"

    def _has_figure(self, record: Mapping[str, Any]) -> bool:
        group, _, name = self.settings.figure.rpartition("/")  # what is evaluated may change with a resume
        return group in record["by_task"] or group in record.get("by_kind", {}) if group else name in record

    def folder(self, version: int) -> Path:
        """Where the student of a version is kept."""
        return best_folder(self._run_dir, version)

    def is_better(self, value: float) -> bool:
        """Whether a figure is better than those of all students that are kept. NaN is not."""
        return value == value and (not self._kept or self._sign * value > self._sign * self._kept[-1][1])

    def note(self, version: int, value: float, kept: bool) -> None:
        """Takes an evaluation. `kept`: its student is in `folder(version)`, and its record says so."""
        self._values.append(value)
        if kept:
            self._kept.append((version, value))
            self.prune()

    def prune(self, last: bool = False) -> None:
        """Removes the students that neither the run nor a resume from one of its checkpoints needs.

        Args:
            last: the run is finished, so only the best one is needed.
        """
        saved = [int(folder.name.rpartition("-")[2]) for folder in list_checkpoints(self._run_dir / "checkpoints")]
        versions = [version for version, _ in self._kept]
        needed = set(versions[-1:])
        for rounds in [] if last else saved or [0]:
            needed.update([version for version in versions if version <= rounds][-1:])
        self._kept = [each for each in self._kept if each[0] in needed]
        names = {self.folder(version).name for version in needed}
        for folder in (self._run_dir / "best").glob("*"):
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)

    def enough(self) -> str | None:
        """Why training should end early, in words; None: it should not."""
        patience, delta = self.settings.patience, self.settings.min_delta
        reference, waited = None, 0
        for value in self._values:
            if value == value and (reference is None or self._sign * value > self._sign * reference + delta):
                reference, waited = value, 0
            else:
                waited += 1
        if patience is None or waited < patience:
            return None
        by = f" by more than {delta:g}" if delta else ""
        best = "" if reference is None else f" than {reference:.4g}"
        return (
            f"{self.settings.figure} was not better{best}{by} in {waited} evaluations in a row "
            f"(checkpoint.keep_best.patience {patience})"
        )
