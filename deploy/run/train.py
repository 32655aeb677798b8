"""`opdlm train`, the driver: on-policy distillation as loops over actors. No tensor passes through this process.

    loop      takes                       does                                              waits for
    produce   free slots of the queue     rollout actors decode, teacher actors score,      a free slot, and room
                                          each sample goes to the queue as it is made       in a rollout actor
    learn     whole rounds of the queue   optimizer steps, new weights, checkpoints         a whole round
              (Ray Train's processes)
    push      new weights of the queue    every rollout actor loads them, evaluation,       a new weight version
                                          the slots of trained rounds become free
    record    the learner's events        metrics.jsonl, TensorBoard, the terminal          an event

    produce ──samples──► queue ──rounds──► learn ──weights──► push ──free slots──► produce

The loops are in `loops.py`, their end in `ending.py`; what happens when something dies, is lost or comes too late is in
`recovery.py`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import ray
from rich.console import Console

from opdlm.common.config import OpdlmConfig
from opdlm.common.model.facts import read_facts, shared_tokens
from opdlm.deploy.cluster.connection import connect, connecting
from opdlm.deploy.cluster.roles import Roles, start_roles
from opdlm.deploy.cluster.scaling import Scaler
from opdlm.deploy.evaluate.during_run import RunEvaluations
from opdlm.deploy.observe.progress import ProgressWatch
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.observe.session import open_records, show_data, show_end, show_notes, show_start
from opdlm.deploy.observe.stages import Stages
from opdlm.deploy.observe.terminal import open_view
from opdlm.deploy.run.directory import check_run, config_digest, find_checkpoint, open_run
from opdlm.deploy.run.ending import run_together
from opdlm.deploy.run.given_responses import GivenResponses, known_responses
from opdlm.deploy.run.lock import RunLock
from opdlm.deploy.run.loops import Loops
from opdlm.deploy.run.paths import absolute_paths, local_models
from opdlm.deploy.run.plan import warnings_of_joined
from opdlm.deploy.run.preflight import Preflight, check_weights, preflight
from opdlm.deploy.run.recovery import survive_queue_deaths
from opdlm.deploy.run.sources import open_source
from opdlm.deploy.run.start_models import prepare_student
from opdlm.deploy.run.stop import EndAtOnce, StopRequest
from opdlm.deploy.run.time_limit import TimeLimit
from opdlm.learner.group import fit
from opdlm.learner.setup import LearnerSetup


def train(config: OpdlmConfig, resume: bool, console: Console) -> int:
    """Runs a job to its end; returns the exit code.

    0: done, or its time is over (`run.max_minutes`). 128 + signal: after a stop with a checkpoint.
    """
    with EndAtOnce() as end:
        return _train(absolute_paths(local_models(config)), resume, console, end)


def _train(config: OpdlmConfig, resume: bool, console: Console, end: EndAtOnce) -> int:
    stage, limit = Stages(console), TimeLimit(config.run.max_minutes)
    check_run(config, resume)
    checked = preflight(config)
    schedule = checked.schedule
    show_notes(checked.notes, console)
    show_data(config, checked.prompts, console)
    check_weights(config)
    responses = known_responses(config, checked.order.used(schedule.total), checked.order.digest)
    with RunLock(Path(config.run.dir)) as lock:
        checkpoint = find_checkpoint(config, resume, checked.order.digest)
        stage(connecting(config.resources))
        connect(config)
        show_notes([f"may not fit: {line}" for line in warnings_of_joined(checked, ray.nodes())], console)
        end.take()
        open_run(config, resume, checkpoint)
        show_start(config, checkpoint, schedule.rounds, console)
        first_round, student = checkpoint.rounds if checkpoint else 0, prepare_student(config)
        stage("loading the models")
        roles = start_roles(config, student, schedule.total, first_round)
        try:
            with (
                open_view(console, schedule.rounds, first_round) as view,
                open_records(config, student, checkpoint, roles.pools(), view, schedule.rounds) as records,
            ):
                records.before_write = lock.verify
                records.samples_of_round = checked.samples_of_round
                prompts, sources = checked.prompts, [share.figures() for share in checked.prompts.shares]
                known = len(prompts.prompts), prompts.refused, checked.order.digest, prompts.unknown_characters
                records.data(*known, sources)
                driver = Driver(console, end, stage, limit)
                code, early_stop = asyncio.run(_run(checked, roles, records, student, responses, driver))
                end.take()
                end.what = "training had ended; --resume writes the report"
        finally:
            roles.stop()
        lock.verify()
        samples = schedule.prompts_per_round, schedule.total
        stopped, time_over = code != 0 or limit.over, code == 0 and limit.over
        show_end(config, samples, stopped, console, time_over, early_stop)
    return code


@dataclass(frozen=True, slots=True)
class Driver:
    """What the loops have of the process: its terminal, its signals, the lines about its stages, its time."""

    console: Console
    end: EndAtOnce
    stage: Stages
    limit: TimeLimit


async def _run(
    checked: Preflight,
    roles: Roles,
    records: RunRecords,
    student: str,
    responses: GivenResponses | None,
    driver: Driver,
) -> tuple[int, str | None]:
    """Returns the exit code, and why training ended early where it did."""
    config, total, rounds = checked.config, checked.schedule.total, checked.schedule.rounds
    stop, limit = StopRequest(driver.console, driver.end), driver.limit
    views = asyncio.create_task(ProgressWatch(roles, checked.schedule, records).watch())
    source = await stop.cancels(open_source(checked, read_facts(student), roles, records, responses))
    if source is None:  # a stop while the teacher wrote responses: nothing has begun
        return stop.exit_code, None
    evaluations = RunEvaluations(checked, roles, records, driver.stage)

    async def run_loops() -> None:
        loops = Loops(config, roles, source, records, evaluations.on_weights)
        evaluations.begin(loops.finish)
        stop.calls(loops.stop, lambda: loops.how_it_ends(rounds))
        watching = asyncio.create_task(limit.watch(loops, rounds, driver.stage))
        setup = LearnerSetup(
            config.model_dump(mode="json"),
            student,
            total,
            config_digest(config),
            checked.order.digest,
            roles.queue,
            shared_tokens(checked.teacher, read_facts(student)),
        )
        try:
            await run_together(loops, lambda: fit(setup, Path(config.run.dir).name))
        except BaseException:
            evaluations.drop()  # a new queue takes the evaluators' weights back
            raise
        finally:
            watching.cancel()

    scaling = asyncio.create_task(Scaler(config, roles, student, records).watch())
    await survive_queue_deaths(config, roles, total, records, run_loops, lambda: stop.asked or limit.over)
    scaling.cancel()
    await evaluations.finish()
    if not (stop.asked or limit.over):
        await evaluations.final()
    views.cancel()
    return stop.exit_code, evaluations.early_stop
