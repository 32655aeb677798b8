"""The records of a run as Ray metrics, which Ray's agents serve to Prometheus beside Ray's own.

A figure is a level, a number of its record alone that adds up over records, or a running total of the run:

    record                                    Ray metric                          Prometheus
    {"kind": "step", "loss": 1.5, ...}        Gauge   opdlm_step_loss             ray_opdlm_step_loss
    {"kind": "step", "tokens": 800, ...}      Counter opdlm_step_tokens           ray_opdlm_step_tokens_total
    {"kind": "round", "rollout_tokens": ...}  Counter opdlm_round_rollout_tokens  ray_opdlm_round_rollout_tokens_total
    its `step`, `round`                       Counter opdlm_steps, opdlm_rounds   ray_opdlm_steps_total, ...

Tags: `run`, the name of the run directory; `row` of an evaluation; `reason` of a failure, the kind of error; `role` of
a death. Ray adds the prefix `ray_` and the suffix `_total`, and hands figures on every 10 s.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from opdlm.deploy.observe.writers import figures

ADDED = {
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
    "learner_restart": {"restarts", "lost_steps"},
    "failed_save": {"saves"},
}
"""Figures that say what happened since the record before: counters go up by them."""
RUNNING = {"round": {"rollout_tokens", "compute_flops", "refused_duplicate", "refused_stale", "samples_made_again"}}
"""Figures that are totals of the run already: counters follow them."""
_TAGS = {"row": "row", "error": "reason", "role": "role"}
"""Texts of a record that become tags."""


class PrometheusWriter:
    """Ray metrics of one run. Does nothing where Ray is not initialised.

    Args:
        run: value of the tag `run`.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics: dict[str, Any] = {}
        self._totals: dict[str, float] = {}

    def write(self, record: dict[str, Any]) -> None:
        """See `Sink`."""
        if not ray.is_initialized():
            return
        kind = record["kind"]
        tags = {"run": self._run, **{tag: str(record[text]) for text, tag in _TAGS.items() if text in record}}
        for figure, value in figures(record):
            name = f"opdlm_{kind}_{figure}"
            if figure in ADDED.get(kind, ()):
                self._add(name, value, tags)
            elif figure in RUNNING.get(kind, ()):
                self._follow(name, value, tags)
            else:
                self._metric(Gauge, name, tags).set(value, tags)
        for place in ("step", "round"):
            self._follow(f"opdlm_{place}s", record[place], {"run": self._run})

    def close(self) -> None:
        """See `Sink`. What was told stays on the driver's metrics until it ends."""

    def _follow(self, name: str, total: float, tags: dict[str, str]) -> None:
        # A learner that comes back repeats rounds: their totals are known, and a counter never goes down.
        before = self._totals.get(name, 0)
        if total > before:
            self._totals[name] = total
            self._add(name, total - before, tags)

    def _add(self, name: str, value: float, tags: dict[str, str]) -> None:
        if value > 0:  # Ray refuses 0; Prometheus shows a counter from its first event on
            self._metric(Counter, name, tags).inc(value, tags)

    def _metric(self, sort: Any, name: str, tags: dict[str, str]) -> Any:
        if name not in self._metrics:
            self._metrics[name] = sort(name, description=name, tag_keys=tuple(tags))
        return self._metrics[name]
