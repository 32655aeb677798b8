"""`opdlm scale`: adds rollout and teacher actors to a running run, or removes some.

The request is a file in the run directory, so it reaches the driver without a port or a token, wherever the driver runs
(in a terminal, in a job of the cluster). The answer is a record in `metrics.jsonl`.

    opdlm scale ──RUN/scale.json──► driver: checks against the cluster, changes pools ──record `scale`──► opdlm scale
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opdlm.actors.pool import ActorPool
from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import ConfigError, OpdlmError, first_line
from opdlm.common.files import write_json
from opdlm.deploy.cluster.placement import check_room
from opdlm.deploy.cluster.roles import Roles, start_rollout, start_teacher
from opdlm.deploy.observe.records import RunRecords, read_records

log = logging.getLogger("opdlm.scaling")

_FILE = "scale.json"
_POLL_SECONDS = 1.0


def request_scale(run_dir: Path, wanted: dict[str, int], timeout_seconds: float) -> dict[str, Any]:
    """Asks a running run for other numbers of actors, and waits for its answer.

    Args:
        wanted: actors by role (`rollout`, `teacher`); a role that is left out keeps its actors.

    Returns: by role, `[before, after]`.

    Raises:
        OpdlmError: the folder holds no run, the run does not answer in time, or it refuses the request.
    """
    if not (run_dir / "metrics.jsonl").exists():
        raise OpdlmError(f"RUN: {run_dir} holds no run; give the run.dir of one that is running")
    if not wanted:
        raise OpdlmError("opdlm scale: found neither --rollout nor --teacher; give --rollout N, --teacher N, or both")
    if too_few := [f"--{role}: found {count}; at least 1" for role, count in wanted.items() if count < 1]:
        raise OpdlmError(too_few[0])
    request = uuid.uuid4().hex
    write_json(run_dir / _FILE, {"request": request, "actors": wanted})
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        for record in read_records(run_dir):
            if record["kind"] == "scale" and record["request"] == request:
                if record["refused"]:
                    raise OpdlmError(record["refused"])
                return {role: record[role] for role in wanted}
        time.sleep(_POLL_SECONDS / 2)
    with contextlib.suppress(FileNotFoundError):
        if request in (run_dir / _FILE).read_text():  # the request of another process may have replaced this one
            (run_dir / _FILE).unlink()
    raise OpdlmError(f"RUN: {run_dir} gave no answer in {timeout_seconds:g} s (--timeout); is it running?")


class Scaler:
    """Carries out the requests in the driver. The new numbers of actors hold until the run's process ends.

    Args:
        student: folder of the student's start weights, for new rollout actors.
    """

    def __init__(self, config: OpdlmConfig, roles: Roles, student: str, records: RunRecords) -> None:
        self._config, self._records = config, records
        self._file = Path(config.run.dir) / _FILE
        self._file.unlink(missing_ok=True)  # a request to an earlier process of the run does not hold any more
        self._pools = {"rollout": roles.rollouts, "teacher": roles.teachers}
        self._places = roles.places
        self._start: dict[str, Callable[[str, Mapping[str, Any]], Any]] = {
            "rollout": lambda name, placement: start_rollout(
                config, name, student, config.rollout.on_new_weights, placement
            ),
            "teacher": lambda name, placement: start_teacher(config, name, placement),
        }
        self._next_number = {role: len(pool.actors) for role, pool in self._pools.items()}
        """Number in the name of the next new actor: names are not used twice."""

    async def watch(self) -> None:
        """Answers requests until it is cancelled."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            if not self._file.exists():
                continue
            try:
                taken = self._file.rename(self._file.with_name(f".{_FILE}.taken"))  # another request may arrive now
                asked = json.loads(taken.read_bytes())
                request = str(asked["request"])
                wanted = {role: int(asked["actors"][role]) for role in self._pools if role in asked["actors"]}
            except (OSError, ValueError, TypeError, KeyError) as error:  # or its sender took it back
                log.warning("%s is no request of `opdlm scale`: %r", self._file, error)
                continue
            await self._answer(request, wanted)

    async def _answer(self, request: str, wanted: dict[str, int]) -> None:
        changes = {}
        try:
            self._check(wanted)
            for role, count in wanted.items():
                pool = self._pools[role]
                before = len(pool.actors)
                self._grow(role, pool, count)
                await self._shrink(pool, count)
                changes[role] = [before, len(pool.actors)]
        except Exception as error:  # any error is the answer, and the run goes on
            if not isinstance(error, ConfigError):
                log.exception("scaling to %s failed after %s", wanted, changes)
            self._records.scaled(request=request, refused=first_line(error))
            return
        log.info("scaled: %s", changes)
        self._records.scaled(request=request, refused="", **changes)

    def _check(self, wanted: dict[str, int]) -> None:
        config = self._config
        if config.run.replay is not None:
            raise ConfigError("run.replay: a replay has no rollout and no teacher actors")
        if unknown := sorted(wanted.keys() - self._places.keys()):
            raise ConfigError(f"{unknown[0]}.actors: a run with objective.kind `{config.objective.kind}` has none")
        counts = {role: wanted.get(role, len(pool.actors)) for role, pool in self._pools.items()}
        changed = {
            "rollout": config.rollout.model_copy(update={"actors": counts["rollout"]}),
            "teacher": config.teacher.model_copy(update={"actors": counts["teacher"]}),
        }
        check_room(config.model_copy(update=changed), "opdlm scale")

    def _grow(self, role: str, pool: ActorPool, count: int) -> None:
        for _ in range(count - len(pool.actors)):
            name = f"{role}-{self._next_number[role]}"
            self._next_number[role] += 1
            pool.add(name, self._start[role](name, self._places[role].options(len(pool.actors))))

    async def _shrink(self, pool: ActorPool, count: int) -> None:
        """Removes the youngest actors, each after its current call."""
        await asyncio.gather(*(pool.retire(name) for name in list(pool.actors)[count:]))
