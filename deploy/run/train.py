"""`opdlm train`, in order: check, open the run directory, start the roles, run the loops, evaluate, report."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import signal
from pathlib import Path

from rich.console import Console

from opdlm.actors.pool import ActorPool
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.checkpoint import list_checkpoints
from opdlm.common.config import OpdlmConfig
from opdlm.common.config.schema import Strategy
from opdlm.common.data.tasks import get_task
from opdlm.common.errors import WeightsLost, last_line
from opdlm.common.model.config import read_config
from opdlm.common.model.facts import count_parameters
from opdlm.common.samples import samples_per_reference
from opdlm.common.types import WeightHandle
from opdlm.deploy.cluster.roles import Roles, connect, start_roles
from opdlm.deploy.cluster.scaling import Scaler
from opdlm.deploy.evaluate.background import BackgroundEvaluations
from opdlm.deploy.evaluate.during_run import HeldOutProblems, evaluate_student, evaluate_teacher
from opdlm.deploy.observe import report
from opdlm.deploy.observe.records import RunRecords, read_records
from opdlm.deploy.observe.terminal import open_view
from opdlm.deploy.observe.wandb import WandbWriter
from opdlm.deploy.run import given_responses as offline
from opdlm.deploy.run.directory import config_digest, open_run
from opdlm.deploy.run.given_responses import GivenResponses
from opdlm.deploy.run.loops import Loops
from opdlm.deploy.run.preflight import Preflight, evaluated_tasks, preflight, prepare_student
from opdlm.deploy.run.recovery import survive_queue_deaths
from opdlm.deploy.run.replay import ReplaySource
from opdlm.deploy.run.sources import GivenSource, OnPolicySource, SampleSource, Scoring
from opdlm.learner.group import LearnerSetup, fit


def train(config: OpdlmConfig, resume: bool, console: Console) -> int:
    """Runs a job to its end; returns the exit code (0 done, 128 + signal after a stop with a checkpoint)."""
    config = absolute(config)
    checked = preflight(config)
    for line in checked.prompts.refused[:10]:
        console.print(f"refused prompt {line}", highlight=False, soft_wrap=True)
    if checked.prompts.refused:
        console.print(f"prompts refused: {len(checked.prompts.refused)}, kept: {len(checked.prompts.prompts)}")
    replay = config.run.replay is not None
    if replay:
        console.print("replay: no rollout and no teacher actors, so no evaluation", highlight=False)
    given = None if replay else offline.known_responses(config, checked.prompts.prompts, checked.order.digest)
    connect(config)
    checkpoint = open_run(config, resume, checked.order.digest)
    first_round = checkpoint.rounds if checkpoint else 0
    first_step = int(checkpoint.state["optimizer_steps"]) if checkpoint else 0
    student = prepare_student(config)
    if checkpoint:
        where = f"{checkpoint.folder} (round {first_round} of {checked.plan.rounds})"
        console.print(f"resuming from {where}", highlight=False, soft_wrap=True)
    wandb = [WandbWriter(config)] if config.run.wandb_project is not None else []
    roles = start_roles(config, student, checked.plan.total, first_round)
    try:
        with open_view(console, checked.plan.rounds, first_round) as view:
            parameters = count_parameters(student), count_parameters(config.model.teacher)
            telemetry = RunRecords(Path(config.run.dir), view, first_round, first_step, parameters, wandb)
            telemetry.data(len(checked.prompts.prompts), checked.prompts.refused, checked.order.digest)
            for pool in roles.pools():
                pool.on_death, pool.on_answer = telemetry.actor_died, telemetry.called
            job = _Job(config, checked, roles, telemetry, student, given)
            try:
                code = asyncio.run(job.run())
            finally:
                telemetry.close()
    finally:
        roles.stop()
    console.print(report.write_report(Path(config.run.dir), (checked.plan.prompts_per_round, checked.plan.total)))
    where = f"{config.run.dir}/report.json, report.png, metrics.jsonl, timeline.json, tensorboard/"
    console.print(f"written: {where}{'' if code else ', student/'}", highlight=False, soft_wrap=True)
    if code:
        saved = (
            "with a checkpoint" if list_checkpoints(Path(config.run.dir) / "checkpoints") else "before any checkpoint"
        )
        console.print(f"stopped {saved}; go on with --resume")
    return code


class _Job:
    """One run of the loops with its evaluations and signals."""

    def __init__(
        self,
        config: OpdlmConfig,
        checked: Preflight,
        roles: Roles,
        telemetry: RunRecords,
        student: str,
        given: GivenResponses | None,
    ) -> None:
        self.config, self.checked, self.roles, self.telemetry = config, checked, roles, telemetry
        self.given = given
        self.setup = LearnerSetup(
            config=config.model_dump(mode="json"),
            student=student,
            total_samples=checked.plan.total,
            config_digest=config_digest(config),
            data_digest=checked.order.digest,
            queue=roles.queue,
        )
        self.settings = DecodeSettings.from_config(config.rollout)
        self.coordinator: Loops | None = None
        self._spare = BackgroundEvaluations(self._evaluate_periodically, self._no_evaluation)
        self._evaluated: set[tuple[str, int]] = set()
        """(row, version) of what an earlier life of the run has evaluated."""
        self.stopped_by = 0
        evaluation = config.evaluation
        # In a replay nobody could answer.
        tasks = [get_task(name) for name in evaluated_tasks(config)] if config.run.replay is None else []
        self._final = (
            HeldOutProblems(tasks, checked.tokenizer, evaluation.final_problems)
            if tasks and evaluation.final_problems
            else None
        )
        self._periodic = (
            HeldOutProblems(tasks, checked.tokenizer, evaluation.problems)
            if tasks and evaluation.every_rounds
            else None
        )

    async def run(self) -> int:
        """Trains; then the final evaluation, unless the run was stopped."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        self._preparing = asyncio.ensure_future(self._source())
        try:
            source = await self._preparing
        except asyncio.CancelledError:  # a signal while responses were generated: nothing has begun
            return 128 + self.stopped_by
        scaling = asyncio.ensure_future(Scaler(self.config, self.roles, self.setup.student, self.telemetry).watch())
        total = self.checked.plan.total
        live = functools.partial(self._live, source)
        await survive_queue_deaths(self.config, self.roles, total, self.telemetry, live, lambda: self.stopped_by > 0)
        scaling.cancel()
        await self._spare.finish()  # after a stop too: the checkpoint is written, and a resumed run would skip them
        if self.stopped_by:
            return 128 + self.stopped_by
        if self._final is not None and self.coordinator and self.coordinator.weights:
            await self._evaluate(report.STATIC, self._final, self.coordinator.weights)
            await self._evaluate(report.DYNAMIC, self._final, self.coordinator.weights)
        return 0

    async def _live(self, source: SampleSource) -> None:
        """One life of the loops; a second one evaluates what the first had not."""
        evaluations = [r for r in read_records(Path(self.config.run.dir)) if r["kind"] == "evaluation"]
        self._evaluated = {(r["row"], r["round"]) for r in evaluations}
        self.coordinator = Loops(self.config, self.roles, source, self.telemetry, self._on_weights)
        setup = dataclasses.replace(self.setup, queue=self.roles.queue)
        try:
            await self.coordinator.run(lambda: fit(setup, Path(self.config.run.dir).name))
        except BaseException:
            self._spare.drop()  # before another life takes the evaluators' weights back
            raise

    async def _source(self) -> SampleSource:
        """Saved samples, the student's rollouts, or given responses, which the teacher makes now if nobody has yet."""
        config, roles, order = self.config, self.roles, self.checked.order
        longest = max(len(prompt.ids) for prompt in self.checked.prompts.prompts)
        per_reference = samples_per_reference(config, read_config(config.model.teacher), longest)
        if config.run.replay is not None:
            return ReplaySource(Path(config.run.replay), config.rollout.prompts_per_round, per_reference)
        scoring = Scoring(roles.teachers, self.telemetry, per_reference)
        if config.objective.kind == "opd":
            return OnPolicySource(config, roles.rollouts, scoring, order)
        if self.given is None:
            prompts = self.checked.prompts.prompts
            made_of = offline.recipe(config, order.digest)
            self.given = await offline.generate_responses(
                config, prompts, roles.teachers, made_of, self.telemetry.generating
            )
        facts, given = self.checked.teacher, self.given
        cut = given.cut_at_inner_end(facts.eos_ids)
        self.telemetry.given(len(given.by_prompt), given.forward_tokens, given.cached, cut)
        return GivenSource(config, scoring, order, self.given.by_prompt, facts.vocab_size, facts.eos_ids)

    def _on_signal(self, number: int) -> None:
        if self.stopped_by:  # asked twice: at once
            raise KeyboardInterrupt
        self.stopped_by = int(number)
        if self.coordinator is None:
            self._preparing.cancel()
        else:
            self._stop = asyncio.ensure_future(self.coordinator.stop())

    async def _on_weights(self, handle: WeightHandle) -> None:
        """Evaluations that belong to a version: the table's first rows before training, the curve's points later."""
        evaluation = self.config.evaluation
        if handle.version == 0 and self._final is not None:
            done = {row for row, _ in self._evaluated}
            if report.TEACHER not in done:
                result = await evaluate_teacher(self.roles.teachers, self._final, evaluation)
                self.telemetry.evaluated(report.TEACHER, 0, result)
            if report.BEFORE not in done:
                await self._evaluate(report.BEFORE, self._final, handle)
        every = evaluation.every_rounds
        due = every is not None and handle.version % every == 0
        if due and self._periodic is not None and (report.PERIODIC, handle.version) not in self._evaluated:
            # On spare actors it goes on beside the run; on the rollout actors decoding waits for it.
            await (self._spare.submit(handle) if self.roles.evaluators else self._evaluate_periodically(handle))

    async def _evaluate_periodically(self, handle: WeightHandle) -> None:
        assert self._periodic is not None
        await self._evaluate(report.PERIODIC, self._periodic, handle, self.roles.evaluators)

    def _no_evaluation(self, handle: WeightHandle, error: WeightsLost) -> None:
        reason = f"no evaluation of version {handle.version}: {last_line(error)}"
        self.telemetry.failed([], 1, reason, type(error).__name__)

    async def _evaluate(
        self, row: str, exam: HeldOutProblems, handle: WeightHandle, pool: ActorPool | None = None
    ) -> None:
        strategy: Strategy = (
            "low_confidence_dynamic" if row in (report.DYNAMIC, report.PERIODIC) else "low_confidence_static"
        )
        settings = self.settings.greedy(strategy)
        pool = pool or self.roles.rollouts
        result = await evaluate_student(pool, exam, handle, settings, self.config.evaluation)
        self.telemetry.evaluated(row, handle.version, result, self.checked.plan.steps_before(handle.version))


def absolute(config: OpdlmConfig) -> OpdlmConfig:
    """Paths as the actors, which have other working directories, must see them."""
    model = config.model.model_copy(
        update={
            "teacher": str(Path(config.model.teacher).resolve()),
            "student": str(Path(config.model.student).resolve()) if config.model.student else None,
        }
    )
    replay = config.run.replay and str(Path(config.run.replay).resolve())
    run = config.run.model_copy(update={"dir": str(Path(config.run.dir).resolve()), "replay": replay})
    cache = config.offline.cache and str(Path(config.offline.cache).resolve())
    given = config.offline.model_copy(update={"cache": cache})
    return config.model_copy(update={"model": model, "run": run, "offline": given})
