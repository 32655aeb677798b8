"""What a run says about itself: one record stream to metrics.jsonl, the live view, TensorBoard and Ray's metrics.

Records have a `kind`: `data`, `step` (one optimizer step), `round`, `publish`, `checkpoint`, `evaluation`, `failure`,
`offline` (given responses), `skipped_step` (a gradient that was not finite), `failed_save` (of a checkpoint),
`actor_death`, `learner_restart`, `queue_death`, `scale` (actors added or taken away). Each round and step is in
`metrics.jsonl` once: what is trained again replaces what was trained before.
Every number is computed where it arises (the decoder, the train step, ...) and only collected here.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from opdlm.actors.teacher.actor import ScoreStats
from opdlm.common.errors import OpdlmError
from opdlm.common.types import DecodeStats, WeightHandle
from opdlm.deploy.evaluate.during_run import EvaluationResult
from opdlm.deploy.observe.prometheus import PrometheusWriter
from opdlm.deploy.observe.timeline import Timeline
from opdlm.deploy.observe.writers import Sink, TensorBoardWriter
from opdlm.deploy.run.directory import HISTORY, truncate_metrics

log = logging.getLogger("opdlm.telemetry")

QUEUE_TOTALS = ("refused_duplicate", "refused_stale", "samples_made_again")
"""Counts of one queue actor; those of a run are their sums over all queues that it had."""


class View(Protocol):
    """Something that shows records as they come."""

    def show(self, record: dict[str, Any]) -> None:
        """Takes one record."""
        ...


class RunRecords:
    """Collects records of one run.

    Args:
        run_dir: gets `metrics.jsonl` (appended) and `tensorboard/`.
        view: shown every record.
        first_round: round that the run (re)starts from; first_step: optimizer steps before it.
        parameters: of student and teacher, for the compute that a run took.
        more: sinks besides TensorBoard and Ray's metrics; closed with the rest.
    """

    def __init__(
        self,
        run_dir: Path,
        view: View,
        first_round: int = 0,
        first_step: int = 0,
        parameters: tuple[int, int] = (0, 0),
        more: Sequence[Sink] = (),
    ) -> None:
        earlier = read_records(run_dir)
        self._flops = next((r["compute_flops"] for r in reversed(earlier) if "compute_flops" in r), 0)
        self._given_before = any(r["kind"] == "offline" for r in earlier)
        self._student_parameters, self._teacher_parameters = parameters
        self._records = run_dir / "metrics.jsonl"
        self._file = self._records.open("a", buffering=1)
        self._timeline = Timeline(run_dir)
        self._learner_starts = 0
        self._of_queue: dict[str, int] = {}
        before: dict[str, Any] = next((r for r in reversed(earlier) if r["kind"] == "round"), {})
        self._of_dead_queues = Counter({name: before[name] for name in QUEUE_TOTALS if name in before})
        self._sinks: list[Sink] = [TensorBoardWriter(run_dir, first_step), PrometheusWriter(run_dir.name), *more]
        self._view = view
        self._started = time.perf_counter() - (earlier[-1]["wall_seconds"] if earlier else 0.0)
        self._round, self._step = first_round, first_step
        self._reset()

    def _reset(self) -> None:
        self._decoded: list[DecodeStats] = []
        self._scored: list[ScoreStats] = []
        self._push_seconds, self._push_bytes = 0.0, 0
        self._learner_seconds = 0.0
        self._round_started = time.perf_counter()

    @property
    def wall_seconds(self) -> float:
        """Seconds of this run so far, earlier lives included."""
        return time.perf_counter() - self._started

    def decoded(self, stats: DecodeStats) -> None:
        """A chunk of prompts was decoded."""
        self._decoded.append(stats)

    def scored(self, stats: ScoreStats) -> None:
        """A chunk of trajectories was scored."""
        self._scored.append(stats)

    def called(self, actor: str, method: str, seconds: float) -> None:
        """An actor of a pool has answered a call."""
        self._timeline.span(actor, method, seconds)

    def failed(self, indices: list[int], attempt: int, reason: str, error: str) -> None:
        """Decoding or scoring a chunk failed and may be tried again. `error`: the kind, of which there are few."""
        figures = {"samples": len(indices), "attempt": attempt, "reason": reason, "error": error}
        self._write({"kind": "failure", "round": self._round, "step": self._step, **figures})

    def data(self, kept: int, refused: list[str], digest: str) -> None:
        """What the prompts are, and by name those that were refused."""
        figures = {"prompts_kept": kept, "prompts_refused": len(refused), "data_digest": digest, "refused": refused}
        self._write({"kind": "data", "round": self._round, "step": self._step, **figures})

    def given(self, responses: int, forward_tokens: int, cached: bool, cut: int = 0) -> None:
        """Given responses are there; their generation counts as compute of this run, also where it was cached.

        `cut`: responses that end at an end-of-sequence token inside them.
        """
        if not self._given_before:
            self._flops += 2 * self._teacher_parameters * forward_tokens
        figures = {
            "responses": responses,
            "teacher_forward_tokens": forward_tokens,
            "cached": cached,
            "responses_cut_at_inner_end": cut,
        }
        self._write(
            {"kind": "offline", "round": self._round, "step": self._step, "compute_flops": self._flops, **figures}
        )

    def generating(self, done: int, total: int) -> None:
        """The teacher has answered `done` of `total` prompts; for the view only."""
        self._view.show({"kind": "generating", "done": done, "total": total})

    def pushed(self, handle: WeightHandle, seconds: float) -> None:
        """A weight version reached every rollout actor."""
        self._push_seconds, self._push_bytes = seconds, handle.nbytes
        self._timeline.span("push", f"version {handle.version}", seconds)

    def actor_died(self, name: str, reason: str) -> None:
        """A rollout or teacher actor died; Ray may bring it back."""
        role = name.rpartition("-")[0]
        self._happened("actor_death", actor=name, role=role, deaths=1, reason=reason)

    def queue_died(self, reason: str) -> None:
        """The replay queue died; the run goes back to its last checkpoint."""
        self._of_dead_queues.update(self._of_queue)
        self._of_queue = {}
        self._happened("queue_death", deaths=1, reason=reason)

    def scaled(self, **figures: Any) -> None:
        """Actors were added or taken away on request, or the request was refused."""
        self._happened("scale", **figures)

    def learned(self, events: list[dict[str, Any]], queue_state: dict[str, Any]) -> None:
        """Events of the learner, with the queue's state and the numbers of actors at the time."""
        self._of_queue = {name: queue_state[name] for name in QUEUE_TOTALS if name in queue_state}
        queue_state = queue_state | {n: total + self._of_dead_queues[n] for n, total in self._of_queue.items()}
        now = time.time()
        for event in events:
            ago = now - event.get("told_at", now)
            event = {name: value for name, value in event.items() if name != "told_at"}
            if event["kind"] == "learner_start":
                self._learner_started(event["round"], event["step"])
                continue
            self._round, self._step = event["round"], event["step"]
            self._learner_seconds += sum(event.get(name, 0.0) for name in _LEARNER_BUSY)
            self._learner_spans(event, ago)
            if event["kind"] == "round":
                event = event | self._round_figures(event, queue_state) | queue_state
                self._reset()
            self._write(event)

    def evaluated(self, row: str, version: int, result: EvaluationResult, step: int | None = None) -> None:
        """An evaluation was done with a weight version, which `step` optimizer steps made (None: those known of)."""
        step = self._step if step is None else step
        self._write({"kind": "evaluation", "row": row, "round": version, "step": step, **asdict(result)})

    def close(self) -> None:
        """Flushes and closes the files."""
        try:
            self._file.close()
        except OSError as error:  # what it says of a record that it could not write was raised then
            log.error("%s: %s", self._file.name, error)
        self._timeline.close()
        for sink in list(self._sinks):
            self._beside(sink, lambda sink: sink.close())

    def _learner_started(self, round_: int, step: int) -> None:
        """The worker group begins, or begins again, from a checkpoint: later steps of before do not count any more."""
        self._learner_starts += 1
        if self._learner_starts == 1:
            return
        lost_steps = self._step - step
        self._file.close()
        # Evaluations stay: their weight versions are not pushed a second time.
        truncate_metrics(self._records, round_, HISTORY | {"evaluation"})
        self._file = self._records.open("a", buffering=1)
        self._round, self._step = round_, step
        self._happened("learner_restart", restarts=1, lost_steps=lost_steps)

    def _happened(self, kind: str, **figures: Any) -> None:
        self._write({"kind": kind, "round": self._round, "step": self._step, **figures})

    def _learner_spans(self, event: dict[str, Any], ago: float) -> None:
        for name in _LEARNER_BUSY:
            if name in event:
                self._timeline.span("learner", name.removesuffix("_seconds"), event[name], ago, round=event["round"])
        if "learner_wait_seconds" in event:  # for the round that it has now trained
            self._timeline.span("learner", "wait", event["learner_wait_seconds"], ago + event["train_seconds"])

    def _round_figures(self, event: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        seconds = time.perf_counter() - self._round_started
        decode_seconds = sum(s.seconds for s in self._decoded)
        score_seconds = sum(s.seconds for s in self._scored)
        decode_tokens = sum(s.forward_tokens for s in self._decoded)
        score_tokens = sum(s.forward_tokens for s in self._scored)
        # The paper's count: 2N a token forward, 6N a token trained.
        student = 2 * decode_tokens + 6 * event["train_forward_tokens"]
        self._flops += self._student_parameters * student + 2 * self._teacher_parameters * score_tokens
        figures: dict[str, Any] = {
            "round_seconds": seconds,
            "weight_push_seconds": self._push_seconds,
            "weight_push_bytes": self._push_bytes,
            "rollout_busy_seconds": decode_seconds,
            "teacher_busy_seconds": score_seconds,
            "learner_busy_seconds": self._learner_seconds,
            "learner_idle_share": idle_share(self._learner_seconds, 1, seconds),
            "learner_tokens_per_second": event["round_tokens"] / event["train_seconds"],
            "run_tokens_per_second": event["round_tokens"] / seconds,
            "rollout_forward_tokens": decode_tokens,
            "teacher_forward_tokens": score_tokens,
            "compute_flops": self._flops,
        }
        if self._decoded:
            tokens = sum(s.response_tokens for s in self._decoded)
            sequences = sum(s.sequences for s in self._decoded)
            ended = sum(s.ended_by_eos for s in self._decoded) / sequences
            figures |= {
                "rollout_tokens_per_second": tokens / decode_seconds,
                "tokens_per_step": tokens / sum(s.denoising_steps for s in self._decoded),
                "response_tokens_mean": tokens / sequences,
                "ended_by_eos_share": ended,
                "ended_by_limit_share": 1 - ended,
                "continued_sequences": sum(s.continued_sequences for s in self._decoded),
                "continued_tokens": sum(s.continued_tokens for s in self._decoded),
                "version_spread_max": max(s.version_spread_max for s in self._decoded),
            }
        if self._scored:
            tokens = sum(s.tokens for s in self._scored)
            figures |= {
                "teacher_tokens_per_second": tokens / score_seconds,
                "target_bytes_per_token": sum(s.nbytes for s in self._scored) / tokens,
            }
        for role, busy in (("rollout", decode_seconds), ("teacher", score_seconds)):
            if actors := state.get(f"{role}_actors"):
                figures[f"{role}_idle_share"] = idle_share(busy, actors, seconds)
        return figures

    def _write(self, record: dict[str, Any]) -> None:
        record = {"wall_seconds": round(self.wall_seconds, 3), **record}
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OpdlmError(
                f"{self._file.name}: {error.strerror}; no record may be lost, so the run ends, with a checkpoint "
                "if there is room for it; make room and go on with --resume"
            ) from error
        for sink in list(self._sinks):
            self._beside(sink, lambda sink: sink.write(record))
        self._view.show(record)

    def _beside(self, sink: Sink, act: Callable[[Sink], None]) -> None:
        """What a sink does; `metrics.jsonl` has every record, so showing it elsewhere must not end a run."""
        try:
            act(sink)
        except Exception:
            log.exception("%s failed and gets no more records", type(sink).__name__)
            self._sinks.remove(sink)


_LEARNER_BUSY = ("train_seconds", "publish_seconds", "checkpoint_seconds")
"""What the learner's events say about its time; the rest of a round it waits for samples."""


def idle_share(busy_seconds: float, actors: int, seconds: float) -> float:
    """Share of `seconds` in which a role's actors did nothing of their work: 1 - busy / (actors x seconds).

    Busy is decoding, scoring, or (the learner's ranks, which go in step) training, publishing and saving. A call
    counts in the round in which it ended, so a round can seem busier than its time: that is 0.
    """
    return max(1 - busy_seconds / (actors * seconds), 0.0)


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run so far; a last line that is being written, or that a crash cut short, is none yet."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
