"""The balance of roles: seconds that each needs for a round, from rates that a run measured. Pure arithmetic.

All rates are response tokens a second: of one rollout actor, of one teacher actor, and of the learner's whole group,
which is taken to scale with its ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.common.errors import OpdlmError

FACTORS = (1, 2, 4, 8)
"""How many times the run file's rollout actors are looked at."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a run measured: medians over its rounds."""

    rounds: int
    """Rounds that were measured."""
    rollout: float
    """Response tokens a second of one rollout actor while it decodes."""
    teacher: float
    """Response tokens a second of one teacher actor while it scores."""
    learner: float
    """Response tokens a second of one rank."""
    tokens_per_sample: float
    """Response tokens of a trajectory."""
    push_seconds: float
    """Seconds until every rollout actor has new weights."""
    slots: int
    """Sequences that a rollout actor decoded side by side."""


@dataclass(frozen=True, slots=True)
class Balance:
    """A round with some number of rollout actors."""

    rollout_actors: int
    slots: int
    """Sequences that an actor decodes side by side."""
    rollout_seconds: float
    push_seconds: float
    teacher_seconds: float
    learner_seconds: float
    round_seconds: float
    """Their sum at `max_staleness` 0. At k, the longest, where a push occupies the rollout actors, or the sum / (k + 1)
    where that is more, as k + 1 rounds are on the way (a small `rollout.prompts_per_call` comes closer to the longest).
    """
    tokens_per_second: float
    bottleneck: str


def read_rates(run: Path) -> Rates:
    """Medians of a run's `round` records.

    Raises:
        OpdlmError: no such run, unreadable records, or rounds without a rate (a replay has no rollout actors).
    """
    config_file, file = run / "config.yaml", run / "metrics.jsonl"
    for needed in (config_file, file):
        if not needed.is_file():
            raise OpdlmError(f"--rates: {needed} does not exist; give the directory of a run that trained some rounds")
    config = config_from_dict(yaml.safe_load(config_file.read_text()))
    rounds = [record for record in _records(file) if record.get("kind") == "round"]
    if not rounds:
        raise OpdlmError(f"--rates: {file} has no round yet; a run's rates are known after its first")

    def typical(name: str) -> float:
        values = [record[name] for record in rounds if name in record]
        if not values or median(values) <= 0:
            raise OpdlmError(
                f"--rates: no round in {file} has {name}; give a run with rollout actors, teacher actors and a learner "
                "(objective.kind opd, no run.replay)"
            )
        return float(median(values))

    return Rates(
        rounds=len(rounds),
        rollout=typical("rollout_tokens_per_second"),
        teacher=typical("teacher_tokens_per_second"),
        learner=typical("learner_tokens_per_second") / config.learner.workers,
        tokens_per_sample=typical("round_tokens") / config.rollout.prompts_per_round,
        push_seconds=typical("weight_push_seconds"),
        slots=slots_of(config, config.rollout.actors),
    )


def _records(file: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise OpdlmError(f"--rates: {file}, line {number} is not JSON: {error}") from None
    return records


def slots_of(config: OpdlmConfig, actors: int) -> int:
    """Sequences that one of so many rollout actors decodes side by side: its part of the round, at most its slots."""
    return min(config.rollout.batch_size, -(-config.rollout.prompts_per_round // actors))


def balance(config: OpdlmConfig, rates: Rates, rollout_actors: int) -> Balance:
    """Seconds of each role for one round, with so many rollout actors and the config's other counts."""
    tokens = rates.tokens_per_sample * config.rollout.prompts_per_round
    # Whole prompts: the actor with the largest part is waited for.
    share = -(-config.rollout.prompts_per_round // rollout_actors) / config.rollout.prompts_per_round
    seconds: Mapping[str, float] = {
        "rollout": tokens * share / rates.rollout,
        "teacher": tokens / (rates.teacher * config.teacher.actors),
        "learner": tokens / (rates.learner * config.learner.workers),
    }
    busy = {**seconds, "rollout": seconds["rollout"] + rates.push_seconds}
    total = max(*busy.values(), sum(busy.values()) / (config.queue.max_staleness + 1))
    return Balance(
        rollout_actors=rollout_actors,
        slots=slots_of(config, rollout_actors),
        rollout_seconds=seconds["rollout"],
        push_seconds=rates.push_seconds,
        teacher_seconds=seconds["teacher"],
        learner_seconds=seconds["learner"],
        round_seconds=total,
        tokens_per_second=tokens / total,
        bottleneck=max(busy, key=lambda role: busy[role]),
    )


def balances(config: OpdlmConfig, rates: Rates) -> list[Balance]:
    """The run file's rollout actors, and 2, 4, 8 times as many."""
    return [balance(config, rates, config.rollout.actors * factor) for factor in FACTORS]


def balance_to_plain(rates: Rates, rows: Sequence[Balance]) -> dict[str, Any]:
    """The same figures for JSON."""
    return {"rates": asdict(rates), "rollout_actors": [asdict(row) for row in rows]}
