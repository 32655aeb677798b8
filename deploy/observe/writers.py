"""Writers show the records of a run in TensorBoard, Prometheus and Weights & Biases.

A number in a record has the same name everywhere: `KIND/NUMBER` (of an evaluation `KIND/ROW/NUMBER`) in TensorBoard and
wandb, `opdlm_KIND_NUMBER` in Prometheus.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.util.metrics import Counter, Gauge
from torch.utils.tensorboard import SummaryWriter

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import OpdlmError, first_line

log = logging.getLogger("opdlm.records")

_NO_NAME = re.compile(r"\W+", re.ASCII)
"""What the name of a metric may not have."""


class RecordWriter(Protocol):
    """Gets every record of a run."""

    def write(self, record: dict[str, Any]) -> None:
        """Takes one record."""
        ...

    def close(self) -> None:
        """No more records follow."""
        ...


class Writers:
    """Several writers as one. One that fails is dropped: `metrics.jsonl` has all records, so the run goes on."""

    def __init__(self, writers: Sequence[RecordWriter]) -> None:
        self._writers = list(writers)

    def write(self, record: dict[str, Any]) -> None:
        """Gives all of them one record."""
        self._each(lambda writer: writer.write(record))

    def close(self) -> None:
        """Closes all of them."""
        self._each(lambda writer: writer.close())

    def _each(self, call: Callable[[RecordWriter], None]) -> None:
        for writer in list(self._writers):
            try:
                call(writer)
            except Exception:
                log.exception("%s failed and gets no more records", type(writer).__name__)
                self._writers.remove(writer)


def numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record by name, without `round` and `step`, which say to which point of the run it belongs."""
    for name, value in record.items():
        if isinstance(value, int | float) and name not in ("round", "step"):
            yield name, value
        elif name == "by_kind" and isinstance(value, dict):
            for kind, of in value.items():
                yield f"right_{_NO_NAME.sub('_', kind)}", of["right"]


def series_name(record: dict[str, Any], number: str) -> str:
    """The series that a number belongs to: `step/loss`, `evaluation/student/exact_match`."""
    return "/".join((record["kind"], *([record["row"]] if "row" in record else []), number))


class TensorBoardWriter:
    """Scalars over optimizer steps, in `tensorboard/` of the run directory.

    Args:
        first_step: optimizer steps before the start or resume of the run; scalars of later steps are purged.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def write(self, record: dict[str, Any]) -> None:
        """See `RecordWriter`."""
        for number, value in numbers(record):
            self._board.add_scalar(series_name(record, number), value, record["step"])

    def close(self) -> None:
        """See `RecordWriter`."""
        self._board.close()


INCREMENTS = {
    "step": {"rows", "rows_without_loss", "loss_positions", "tokens", "attention_padding"},
    "round": {
        "round_tokens",
        "train_forward_tokens",
        "rollout_forward_tokens",
        "teacher_forward_tokens",
        "continued_sequences",
        "continued_tokens",
    },
    "failure": {"samples"},
    "skipped_step": {"steps"},
    "actor_death": {"deaths"},
    "queue_death": {"deaths"},
    "damaged_checkpoint": {"checkpoints"},
    "learner_restart": {"restarts", "lost_steps"},
    "failed_save": {"saves"},
}
"""By kind, numbers that count what happened since the record before. Prometheus counters are increased by them."""
TOTALS = {
    "round": {
        "rollout_tokens",
        "compute_flops",
        "gpu_hours",
        "refused_duplicate",
        "refused_stale",
        "samples_made_again",
    }
}
"""By kind, numbers that are totals of the run. Prometheus counters are raised to them."""
_TAGS = {"row": "row", "error": "reason", "role": "role"}
"""The text fields of a record that become tags, and the tags' names."""


class PrometheusWriter:
    """Metrics of one run in Ray, whose agents serve them to Prometheus beside Ray's own.

    The numbers in `INCREMENTS` and `TOTALS` are counters, all others are gauges:

        a record                                Ray metric                          Prometheus
        {"kind": "step", "loss": 1.5}           Gauge opdlm_step_loss               ray_opdlm_step_loss
        {"kind": "step", "tokens": 800}         Counter opdlm_step_tokens           ray_opdlm_step_tokens_total
        {"kind": "round", "rollout_tokens": 9}  Counter opdlm_round_rollout_tokens  ray_opdlm_round_rollout_tokens_total
        its `step`, `round`                     Counter opdlm_steps, opdlm_rounds   ray_opdlm_steps_total, ...

    Tags: `run`, the name of the run directory; `row` of an evaluation; `reason` of a failure, the class of the error;
    `role` of an actor's death. Ray adds the prefix `ray_` and the suffix `_total`, and exports every 10 s. Where Ray is
    not initialised, nothing is written.

    Args:
        run: value of the tag `run`.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics: dict[str, Any] = {}
        self._totals: dict[str, float] = {}

    def write(self, record: dict[str, Any]) -> None:
        """See `RecordWriter`."""
        if not ray.is_initialized():
            return
        kind = record["kind"]
        tags = {"run": self._run, **{tag: str(record[text]) for text, tag in _TAGS.items() if text in record}}
        for number, value in numbers(record):
            name = f"opdlm_{kind}_{number}"
            if number in INCREMENTS.get(kind, ()):
                self._increase(name, value, tags)
            elif number in TOTALS.get(kind, ()):
                self._raise_to(name, value, tags)
            else:
                self._metric(Gauge, name, tags).set(value, tags)
        for place in ("step", "round"):
            self._raise_to(f"opdlm_{place}s", record[place], {"run": self._run})

    def close(self) -> None:
        """See `RecordWriter`. Ray keeps exporting the last values until the driver ends."""

    def _raise_to(self, name: str, total: float, tags: dict[str, str]) -> None:
        # A restarted learner repeats rounds: their totals were reported before, and a counter never decreases.
        before = self._totals.get(name, 0)
        if total > before:
            self._totals[name] = total
            self._increase(name, total - before, tags)

    def _increase(self, name: str, value: float, tags: dict[str, str]) -> None:
        if value > 0:  # Ray refuses 0. Prometheus shows a counter from its first increase on.
            self._metric(Counter, name, tags).inc(value, tags)

    def _metric(self, metric_class: Any, name: str, tags: dict[str, str]) -> Any:
        if name not in self._metrics:
            self._metrics[name] = metric_class(name, description=name, tag_keys=tuple(tags))
        return self._metrics[name]


_WANDB_STEP = "optimizer_step"


class WandbWriter:
    """A wandb run (`run.wandb_project`, extra `wandb`) with the name of the run directory and TensorBoard's series.

    A resumed run continues in the same wandb run, whose id is in `RUN/wandb_id`.

    Raises:
        OpdlmError: wandb cannot start (no login, no network).
    """

    def __init__(self, config: OpdlmConfig) -> None:
        wandb: Any = importlib.import_module("wandb")
        run_dir = Path(config.run.dir)
        file = run_dir / "wandb_id"
        try:
            self._run = wandb.init(
                project=config.run.wandb_project,
                name=run_dir.name,
                id=file.read_text() if file.exists() else None,
                resume="allow",
                dir=str(run_dir),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off"),  # wandb must not print into the live view
            )
        except wandb.Error as error:
            reason = first_line(error)
            raise OpdlmError(
                f"run.wandb_project: wandb does not start: {reason} (WANDB_MODE=offline needs no login and no network)"
            ) from error
        file.write_text(self._run.id)
        self._run.define_metric("*", step_metric=_WANDB_STEP)

    def write(self, record: dict[str, Any]) -> None:
        """See `RecordWriter`."""
        shown = {series_name(record, number): value for number, value in numbers(record)}
        self._run.log({_WANDB_STEP: record["step"], **shown})

    def close(self) -> None:
        """See `RecordWriter`."""
        self._run.finish()
