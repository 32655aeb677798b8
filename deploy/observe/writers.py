"""Where the records of a run go besides `metrics.jsonl`: TensorBoard, Prometheus, wandb. One name for one figure.

A record's figure is `KIND/FIGURE` (`KIND/ROW/FIGURE` of an evaluation) in TensorBoard and wandb, and
`opdlm_KIND_FIGURE` in Prometheus.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter


class Sink(Protocol):
    """Takes every record of a run."""

    def write(self, record: dict[str, Any]) -> None:
        """Takes one record."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


def figures(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record by name, without `round` and `step`, which say where in the run it is."""
    for name, value in record.items():
        if isinstance(value, int | float) and name not in ("round", "step"):
            yield name, value


def path_of(record: dict[str, Any], figure: str) -> str:
    """Where a figure is shown: `step/loss`, `evaluation/student/exact_match`."""
    return "/".join((record["kind"], *([record["row"]] if "row" in record else []), figure))


class TensorBoardWriter:
    """Scalars over optimizer steps in `tensorboard/` of the run directory.

    Args:
        first_step: optimizer steps before this life of the run; what an earlier life wrote behind them is dropped.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def write(self, record: dict[str, Any]) -> None:
        """See `Sink`."""
        for figure, value in figures(record):
            self._board.add_scalar(path_of(record, figure), value, record["step"])

    def close(self) -> None:
        """See `Sink`."""
        self._board.close()
