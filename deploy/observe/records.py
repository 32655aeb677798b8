"""The records of a run: one stream to `metrics.jsonl`, the terminal, TensorBoard, Prometheus and wandb.

A record has a `kind`: `data`, `step` (one optimizer step), `round`, `publish`, `checkpoint`, `evaluation`, `failure`,
`offline` (given responses), `skipped_step` (nothing to learn from, or no finite gradient), `failed_save`,
`actor_death`, `learner_restart`, `queue_death`, `damaged_checkpoint`, `scale` (actors were added or removed),
`early_stop`. `metrics.jsonl` has each round and step once: training a round again replaces its earlier records.
The figures are measured where the work is done (the decoder, the train step, ...) and only collected here.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opdlm.actors.progress import CallProgress
from opdlm.actors.reward.actor import RewardStats
from opdlm.actors.teacher.actor import ScoreStats
from opdlm.common.errors import OpdlmError
from opdlm.common.types import DecodeStats, StreamReport, WeightHandle
from opdlm.deploy.evaluate.held_out import EvaluationResult
from opdlm.deploy.observe.outlook import Outlook
from opdlm.deploy.observe.progress import RunProgress
from opdlm.deploy.observe.round_figures import LEARNER_WORK, RoundReports
from opdlm.deploy.observe.terminal import View
from opdlm.deploy.observe.timeline import Timeline
from opdlm.deploy.observe.writers import PrometheusWriter, RecordWriter, TensorBoardWriter, Writers
from opdlm.deploy.run.directory import HISTORY, truncate_metrics

log = logging.getLogger("opdlm.records")

QUEUE_TOTALS = ("refused_duplicate", "refused_stale", "samples_made_again")
"""Counts that each queue actor starts at 0. The run's totals are the sums over all queue actors that it had."""


class RunRecords:
    """Collects what the roles of one run report, and writes it as records.

    Args:
        run_dir: gets `metrics.jsonl` and `timeline.json` (both appended to) and `tensorboard/`.
        view: is shown every record.
        first_round: the round that the run starts or resumes from; first_step: optimizer steps before it.
        parameters: of student and teacher, from which the run's compute is counted.
        more: writers besides TensorBoard's and Prometheus's; closed together with them.
    """

    def __init__(
        self,
        run_dir: Path,
        view: View,
        first_round: int = 0,
        first_step: int = 0,
        parameters: tuple[int, int] = (0, 0),
        more: Sequence[RecordWriter] = (),
    ) -> None:
        earlier = read_records(run_dir)
        self._flops = next((r["compute_flops"] for r in reversed(earlier) if "compute_flops" in r), 0)
        self._generation_counted = any(r["kind"] == "offline" for r in earlier)
        self._student_parameters, self._teacher_parameters = parameters
        self._path = run_dir / "metrics.jsonl"
        self._file = self._path.open("a", buffering=1)
        self._timeline = Timeline(run_dir)
        self._learner_starts = 0
        self._queue_totals: dict[str, int] = {}
        last_round: dict[str, Any] = next((r for r in reversed(earlier) if r["kind"] == "round"), {})
        self._dead_queues_totals = Counter({name: last_round[name] for name in QUEUE_TOTALS if name in last_round})
        self._writers = Writers([TensorBoardWriter(run_dir, first_step), PrometheusWriter(run_dir.name), *more])
        self._view = view
        self._started = time.perf_counter() - (earlier[-1]["wall_seconds"] if earlier else 0.0)
        self._round, self._step = first_round, first_step
        self.before_write: Callable[[], None] = lambda: None
        """Called before anything is written; ends the process where the run directory is no longer its own."""
        self.samples_of_round: Callable[[int], Mapping[str, int]] = lambda _: {}
        """Counts the samples of a round by source, for its record."""
        self.progress = RunProgress()
        """What the actors have done of the work that goes on."""
        self.progress.at(first_round, first_step)
        self.outlook: Outlook | None = None
        """Adds to a round's record how long the run still takes, and its GPU-hours. None: nothing is added."""
        self._begin_round()

    def _begin_round(self) -> None:
        self._reports = RoundReports()
        self._round_started = time.perf_counter()

    @property
    def wall_seconds(self) -> float:
        """Seconds that the run has taken so far, before a resume included."""
        return time.perf_counter() - self._started

    def streamed(self, actor: str, report: StreamReport) -> None:
        """A rollout actor reported what it decoded since its last report."""
        self.before_write()
        self.decoded(report.stats)
        self.progress.decoded([one.index for one in report.ended], report.stats.response_tokens)
        self.progress.unfinished[actor] = report.tokens_so_far
        self._timeline.sequences(actor, report.ended)

    def decoded(self, stats: DecodeStats) -> None:
        """A rollout actor decoded prompts."""
        self._reports.decoded.append(stats)

    def scored(self, stats: ScoreStats) -> None:
        """A teacher actor scored trajectories."""
        self._reports.scored.append(stats)

    def judged(self, stats: RewardStats) -> None:
        """A reward actor judged responses to one prompt."""
        self._reports.judged.append(stats)

    def called(self, actor: str, method: str, seconds: float) -> None:
        """An actor of a pool answered a call."""
        self.before_write()
        self._timeline.span(actor, method, seconds)

    def failed(self, indices: list[int], attempt: int, reason: str, error: str) -> None:
        """Decoding or scoring samples failed for the `attempt`-th time, and may be tried again.

        `reason`: the error's text; `error`: the error's class, which becomes a tag in Prometheus.
        """
        self._record("failure", samples=len(indices), attempt=attempt, reason=reason, error=error)

    def data(
        self,
        kept: int,
        refused: list[str],
        digest: str,
        unknown_characters: int = 0,
        sources: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """The prompts were read: `kept` of them are used, those in `refused` are not; `digest` is their fingerprint.

        Args:
            unknown_characters: characters in them and in their responses that the tokenizer does not know.
            sources: figures of each of `data.sources`.
        """
        counts = {"prompts_kept": kept, "prompts_refused": len(refused), "unknown_characters": unknown_characters}
        self._record("data", **counts, data_digest=digest, refused=refused, sources=list(sources))

    def given(self, responses: int, forward_tokens: int, cached: bool, cut: int = 0) -> None:
        """The given responses are available. Their generation counts once as compute, also if they were cached.

        Args:
            forward_tokens: tokens that went through the teacher to generate them.
            cut: responses that were cut at an end-of-sequence token inside them.
        """
        if not self._generation_counted:
            self._flops += 2 * self._teacher_parameters * forward_tokens
        self._record(
            "offline",
            compute_flops=self._flops,
            responses=responses,
            teacher_forward_tokens=forward_tokens,
            cached=cached,
            responses_cut_at_inner_end=cut,
        )

    def progressed(self, board: Mapping[str, CallProgress], seconds: float) -> None:
        """Shows the view how far the run is; no record is written. See `RunProgress.figures`."""
        self._view.show(self.progress.figures(board, seconds))

    def pushed(self, handle: WeightHandle, seconds: float) -> None:
        """A weight version reached every rollout actor."""
        self.before_write()
        self._reports.push_seconds, self._reports.push_bytes = seconds, handle.nbytes
        self._timeline.span("push", f"version {handle.version}", seconds)

    def actor_died(self, name: str, reason: str) -> None:
        """An actor of a pool died; Ray may restart it."""
        role = name.rpartition("-")[0]
        self._record("actor_death", actor=name, role=role, deaths=1, reason=reason)

    def queue_died(self, reason: str) -> None:
        """The replay queue died; the run goes back to its last checkpoint."""
        self._start_new_queue()
        self._record("queue_death", deaths=1, reason=reason)

    def went_back(self, reason: str) -> None:
        """The newest checkpoint is damaged; the run goes back to the one before it."""
        self._start_new_queue()
        self._record("damaged_checkpoint", checkpoints=1, reason=reason)

    def _start_new_queue(self) -> None:
        self._dead_queues_totals.update(self._queue_totals)
        self._queue_totals = {}
        self.progress.forget_samples()

    def scaled(self, **figures: Any) -> None:
        """A request of `opdlm scale` was carried out or refused."""
        self._record("scale", **figures)

    def learned(self, events: list[dict[str, Any]], queue_state: dict[str, Any]) -> None:
        """The learner reported events.

        Args:
            queue_state: the queue's figures and the numbers of actors at this time; they go into a `round` record.
        """
        self.before_write()
        self._queue_totals = {name: queue_state[name] for name in QUEUE_TOTALS if name in queue_state}
        queue_state = queue_state | {n: total + self._dead_queues_totals[n] for n, total in self._queue_totals.items()}
        now = time.time()
        for event in events:
            seconds_ago = now - event.get("told_at", now)
            event = {name: value for name, value in event.items() if name != "told_at"}
            self.progress.learner_began = True
            self.progress.at(event["round"], event["step"])
            if event["kind"] == "learner_start":
                self._learner_started(event["round"], event["step"])
                continue
            self._round, self._step = event["round"], event["step"]
            self._reports.learner_seconds += sum(event.get(name, 0.0) for name in LEARNER_WORK)
            self._timeline.learner_spans(event, seconds_ago, LEARNER_WORK)
            if event["kind"] == "round":
                event = event | self._round_figures(event, queue_state) | queue_state
                event |= self.samples_of_round(event["round"] - 1)
                self._begin_round()
            self._write(event)

    def evaluated(
        self,
        row: str,
        version: int,
        result: EvaluationResult,
        step: int | None = None,
        best_by: str | None = None,
        strategy: str | None = None,
    ) -> None:
        """A weight version was evaluated, after `step` optimizer steps (None: those reported so far).

        `best_by`: by which figure its student is the best so far and is kept; None: it is not kept. `strategy`: how it
        was decoded; None for an autoregressive model.
        """
        step, more = self._step if step is None else step, {"best_by": best_by, "strategy": strategy}
        known = {key: value for key, value in more.items() if value is not None}
        self._write({"kind": "evaluation", "row": row, "round": version, "step": step, **asdict(result), **known})

    def ends_early(self, reason: str) -> None:
        """Training ends before its last round."""
        self._record("early_stop", reason=reason)

    def close(self) -> None:
        """Flushes and closes all files and writers."""
        try:
            self._file.close()
        except OSError as error:  # of a record whose write failed, which raised an error at that time
            log.error("%s: %s", self._file.name, error)
        self._timeline.close()
        self._writers.close()

    def _learner_started(self, round_: int, step: int) -> None:
        """The learner started from a checkpoint. On a restart, the records of the rounds after it are dropped.

        So they are if its first start finds the newest checkpoint damaged since the driver looked.
        """
        self._learner_starts += 1
        if self._learner_starts == 1 and round_ == self._round:
            return
        lost_steps = self._step - step
        self._file.close()
        # Evaluations stay: their weight versions are not pushed a second time.
        truncate_metrics(self._path, round_, HISTORY | {"evaluation"})
        self._file = self._path.open("a", buffering=1)
        self._round, self._step = round_, step
        self._record("learner_restart", restarts=1, lost_steps=lost_steps)

    def _round_figures(self, event: dict[str, Any], queue_state: dict[str, Any]) -> dict[str, Any]:
        seconds = time.perf_counter() - self._round_started
        parameters = self._student_parameters, self._teacher_parameters
        self._flops += self._reports.flops(event["train_forward_tokens"], *parameters)
        return self._reports.figures(event, queue_state, seconds) | {"compute_flops": self._flops}

    def _record(self, kind: str, **figures: Any) -> None:
        """Writes a record at the round and the step that the learner reported last."""
        self._write({"kind": kind, "round": self._round, "step": self._step, **figures})

    def _write(self, record: dict[str, Any]) -> None:
        self.before_write()
        record = {"wall_seconds": round(self.wall_seconds, 3), **record}
        record |= self.outlook.note(record) if self.outlook is not None else {}
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OpdlmError(
                f"{self._file.name}: {error.strerror}; no record may be lost, so the run ends, with a checkpoint "
                "if there is room for it; make room and go on with --resume"
            ) from error
        self._writers.write(record)
        self._view.show(record)


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run so far. A last line that is incomplete (in writing, or cut by a crash) is left out."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
