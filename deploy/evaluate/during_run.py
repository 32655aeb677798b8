"""The evaluations of a run, with its own actors: before training, every few rounds, and at the end.

A periodic evaluation on spare actors (`evaluation.actors`) goes on beside the run (`BackgroundEvaluations`). Without
spare actors the rollout actors evaluate, and decoding waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opdlm.actors.pool import ActorPool
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.batches import in_groups
from opdlm.common.config.base import STRATEGIES_BY_ORDER
from opdlm.common.config.schema import DecodingOrder, EvaluationConfig, Strategy
from opdlm.common.data.tasks import get_task
from opdlm.common.errors import WeightsLost, last_line
from opdlm.common.grid import BlockGrid
from opdlm.common.types import DecodeStats, RolloutRequest, Trajectory, WeightHandle
from opdlm.deploy.cluster.roles import Roles
from opdlm.deploy.evaluate.background import BackgroundEvaluations
from opdlm.deploy.evaluate.beside_teacher import BesideTeacher
from opdlm.deploy.evaluate.best import BestStudent
from opdlm.deploy.evaluate.exam import Exam
from opdlm.deploy.evaluate.held_out import EvaluationResult, HeldOutProblems
from opdlm.deploy.observe.progress import RunProgress
from opdlm.deploy.observe.records import RunRecords, read_records
from opdlm.deploy.observe.report import BEFORE, DYNAMIC, PERIODIC, STATIC, TEACHER, VERIFIED, figure_of
from opdlm.deploy.run.preflight import Preflight, evaluated_tasks


class RunEvaluations:
    """Evaluates weight versions and records the results. A replay has no actors that could answer, so it does nothing.

    Args:
        checked: what the preflight found: tokenizer and schedule.
        roles: the pools that answer.
        records: gets the results.
        stage: told when an evaluation begins that the run waits for.
    """

    def __init__(
        self,
        checked: Preflight,
        roles: Roles,
        records: RunRecords,
        stage: Callable[[str], None] = lambda what: None,
    ) -> None:
        config = checked.config
        self._config, self._checked, self._roles, self._records = config, checked, roles, records
        self._stage = stage
        self._settings = DecodeSettings.from_config(config.rollout)
        self._background = BackgroundEvaluations(self._evaluate_periodically, self._note_lost_weights)
        self._done: set[tuple[str, int]] = set()
        """(row, weight version) of what was evaluated before, perhaps by an earlier process of the run."""
        settings = config.evaluation
        tasks = [get_task(name) for name in evaluated_tasks(config)] if config.run.replay is None else []
        ends = {*checked.teacher.eos_ids, *checked.student.eos_ids}  # both answer

        def exam(count: int | None, limit: int | None) -> Exam | None:
            known = checked.questions.chosen(limit) if checked.questions is not None else None
            if not count or not (tasks or known):
                return None
            return Exam(HeldOutProblems(tasks, checked.tokenizer, count, ends) if tasks else None, known)

        self._beside = BesideTeacher(config, roles.teachers, checked.form, checked.teacher.tokens)
        keep = config.checkpoint.keep_best
        self._best = BestStudent(Path(config.run.dir), keep) if keep is not None else None
        self._end_early: Callable[[], Awaitable[bool]] = _too_late
        self.early_stop: str | None = None
        """Why training ends early, in words; None: it does not."""
        self._newest: WeightHandle | None = None
        self._final = exam(settings.final_problems, None)
        self._periodic = exam(settings.problems if settings.every_rounds else None, settings.limit)

    def begin(self, end_early: Callable[[], Awaitable[bool]]) -> None:
        """Reads from the run's records what need not be evaluated again. Call this before the loops start.

        Args:
            end_early: ends training as a finished run; returns False where an end was asked for before.
        """
        records = read_records(Path(self._config.run.dir))
        evaluations = [record for record in records if record["kind"] == "evaluation"]
        self._done = {(record["row"], record["round"]) for record in evaluations}
        self._end_early, self.early_stop = end_early, None
        if self._best is not None and (note := self._best.restore(evaluations)):
            self._stage(note)

    async def on_weights(self, handle: WeightHandle) -> None:
        """Evaluates what is due with a version: the first rows of the table with version 0, later the curve's points.

        Raises:
            WeightsLost: the version died before the rollout actors had it.
        """
        self._newest = handle
        await self._end_if_enough()  # a resumed run had perhaps ended early
        if handle.version == 0 and self._final is not None:
            rows = {row for row, _ in self._done}
            problems = len(self._final.prompt_ids)
            if TEACHER not in rows and self._roles.teachers.actors:
                self._stage(f"examining the teacher: {problems:,} problems")
                progress = self._records.progress
                arguments = self._roles.teachers, self._final, self._config.evaluation, progress, self._beside
                result = await evaluate_teacher(*arguments)
                self._record(TEACHER, 0, result)
            if BEFORE not in rows:
                self._stage(f"examining the student before training: {problems:,} problems")
                await self._evaluate(BEFORE, self._final, handle)
            self._stage("training")
        every = self._config.evaluation.every_rounds
        due = every is not None and handle.version % every == 0 and (PERIODIC, handle.version) not in self._done
        if due and self._periodic is not None:
            await (self._background.submit(handle) if self._roles.evaluators else self._evaluate_periodically(handle))

    def drop(self) -> None:
        """Cancels the background evaluations: the weights that they need are gone."""
        self._background.drop()

    async def finish(self) -> None:
        """Waits for the background evaluations, also after a stop: a resumed run would not make them."""
        self._end_early = _too_late
        await self._background.finish()

    async def final(self) -> None:
        """Evaluates the newest version, which is the trained student, for the last rows of the table."""
        if self._best is not None:
            self._best.prune(last=True)
        if self._final is not None and self._newest is not None:
            rows = (VERIFIED,) if self._settings.strategy == "verified" else (STATIC, DYNAMIC)
            self._stage(f"examining the trained student, {'with two decodings' if len(rows) > 1 else 'verified'}")
            for row in rows:
                await self._evaluate(row, self._final, self._newest)

    async def _evaluate_periodically(self, handle: WeightHandle) -> None:
        assert self._periodic is not None
        pool = self._roles.evaluators or self._roles.rollouts
        result = await self._ask(PERIODIC, self._periodic, handle, pool)
        if (best := self._best) is None:
            return self._record(PERIODIC, handle.version, result)
        figure = figure_of(asdict(result), best.settings.figure)
        if better := best.is_better(figure):  # before the record, which says that the student is kept
            grid = BlockGrid(self._config.rollout.block_size, self._config.rollout.block_grid)
            arguments = handle, best.folder(handle.version), grid, self._config.decoding_order
            await pool.call("save_student", *arguments)
        self._record(PERIODIC, handle.version, result, best_by=best.label if better else None)
        best.note(handle.version, figure, better)
        await self._end_if_enough()

    async def _end_if_enough(self) -> None:
        """Ends training early where no better student is expected (`checkpoint.keep_best.patience`)."""
        last = self._newest is not None and self._newest.version == self._checked.schedule.rounds
        if self._best is None or last or self.early_stop or not (why := self._best.enough()):
            return
        if await self._end_early():
            self.early_stop = why
            self._records.ends_early(why)

    def _note_lost_weights(self, handle: WeightHandle, error: WeightsLost) -> None:
        reason = f"no evaluation of version {handle.version}: {last_line(error)}"
        self._records.failed([], 1, reason, type(error).__name__)

    async def _evaluate(self, row: str, problems: Exam, handle: WeightHandle) -> None:
        self._record(row, handle.version, await self._ask(row, problems, handle, self._roles.rollouts))

    async def _ask(self, row: str, problems: Exam, handle: WeightHandle, pool: ActorPool) -> EvaluationResult:
        settings = self._settings.greedy(self._strategy(row))
        task, progress = f"evaluation of round {handle.version}, {row}", self._records.progress
        arguments = pool, problems, handle, settings, self._config.evaluation, task, progress, self._beside
        return await evaluate_student(*arguments)

    def _strategy(self, row: str) -> Strategy:
        return examined_with(self._settings.strategy, self._config.decoding_order, row in (DYNAMIC, PERIODIC))

    def _record(self, row: str, version: int, result: EvaluationResult, best_by: str | None = None) -> None:
        step = self._checked.schedule.steps_before(version)
        strategy = None if row == TEACHER else self._strategy(row)
        self._records.evaluated(row, version, result, step, best_by, strategy)
        self._done.add((row, version))


def examined_with(rollouts: Strategy, order: DecodingOrder, dynamic: bool) -> Strategy:
    """How a run's student is examined: with a threshold, or else a token at a time."""
    return rollouts if rollouts == "verified" else STRATEGIES_BY_ORDER[order][dynamic]


async def _too_late() -> bool:
    """Training has ended."""
    return False


async def evaluate_student(
    pool: ActorPool,
    problems: Exam,
    handle: WeightHandle,
    settings: DecodeSettings,
    config: EvaluationConfig,
    task: str,
    progress: RunProgress,
    beside: BesideTeacher,
) -> EvaluationResult:
    """Decodes the problems over all actors of a pool with one weight version.

    `task`: the name under which `progress` counts the answers.
    """
    requests = problems.requests(config.max_new_tokens)
    size = -(-len(requests) // max(len(pool.actors), 1))  # an empty pool raises its own error
    parts = in_groups(requests, size)

    async def decode(part: list[RolloutRequest]) -> tuple[list[Any], DecodeStats]:
        with progress.call(task, range(len(part))) as call:
            arguments = (part, handle, settings, config.batch_size, *call.watch)
            decoded, stats = await pool.fetch("decode", *arguments, outputs=1)
            call.tokens = stats.response_tokens
        return decoded, stats

    with progress.task(task, len(requests)):
        done = await asyncio.gather(*(decode(part) for part in parts))
    trajectories: list[Trajectory] = [trajectory for (decoded,), _ in done for trajectory in decoded]
    seconds = sum(stats.seconds for _, stats in done)
    steps = [t.denoising_steps for t in trajectories]
    result = problems.result([t.response for t in trajectories], steps, seconds)
    return await beside.add(problems, result, trajectories, pool, handle)


async def evaluate_teacher(
    pool: ActorPool, problems: Exam, config: EvaluationConfig, progress: RunProgress, beside: BesideTeacher
) -> EvaluationResult:
    """The teacher's greedy autoregressive answers: one token per step."""
    task, count = "evaluation of the teacher", len(problems.prompt_ids)
    with progress.task(task, count), progress.call(task, range(count)) as call:
        arguments = (problems.prompt_ids, config.max_new_tokens, config.batch_size, 0.0, 0, *call.watch)
        _, (responses, seconds) = await pool.call("generate", *arguments)
    beside.keep(problems, responses)
    return problems.result(responses, [len(response) for response in responses], seconds)
