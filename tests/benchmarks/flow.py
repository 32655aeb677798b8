"""What the driver and the queue cost, and how they share work out: the real loops with fake actors in virtual time.

    make bench        # or: python -m tests.benchmarks.flow [--actors 64 --slots 64 --round 1024]

Every figure but the first is in virtual time and exact. CPU time per sample is this process's, which runs driver, queue
and fakes together, over rounds of `--round` samples on `--actors` rollout actors of `--slots` slots; the fakes' part is
in it. Lengths are lognormal (median an eighth of the limit, sigma 1, cut at the limit), in denoising steps of a second.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from tests.benchmarks.forced_lengths import lognormal
from tests.benchmarks.measure import write_json
from tests.fakes import virtual_time
from tests.fakes.simulated_run import Shape, SimulatedRun, Stages
from tests.fakes.slot_rollout import SlotRollout

LIMIT = 1024


def run(shape: Shape, stages: Stages, actors: list[tuple[int, float]], slots: int) -> dict[str, Any]:
    """One run. `actors`: (slots, seconds of a step) of each rollout actor; `slots`: `rollout.batch_size`."""
    lengths = lognormal(shape.rounds * shape.prompts_per_round, LIMIT, 0)

    async def scenario(folder: str) -> dict[str, Any]:
        made = {
            f"rollout-{i}": SlotRollout(count, lengths.__getitem__, seconds)
            for i, (count, seconds) in enumerate(actors)
        }
        simulated = SimulatedRun(Path(folder), shape, stages, rollouts=lambda: made)
        started = time.process_time()
        await simulated.run()
        cpu = time.process_time() - started
        last = max(at for actor in made.values() for at in actor.began.values())
        full = sum(count * last for count, _ in actors)
        occupied = sum(
            n * s for actor, (_, s) in zip(made.values(), actors, strict=True) for at, n in actor.steps if at <= last
        )
        return {
            "cpu_seconds_per_sample": cpu / len(lengths),
            "decoded_at": max(actor.steps[-1][0] for actor in made.values()),
            "occupancy": occupied / full,
            "teacher_seconds": simulated.teacher_seconds,
            "lengths": lengths,
        }

    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = virtual_time.run(scenario(folder))
    return result


def ideal_seconds(lengths: list[int], actors: list[tuple[int, float]]) -> float:
    """The least time in which these actors could decode these lengths, if all slots were always full.

    Or the longest sequence on the fastest actor, where that takes longer.
    """
    speed = sum(count / seconds for count, seconds in actors)
    return max(sum(lengths) / speed, max(lengths) * min(seconds for _, seconds in actors))


def main() -> None:
    """Measures, prints a table, writes JSON."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--actors", type=int, default=64)
    made.add_argument("--slots", type=int, default=64)
    made.add_argument("--round", type=int, default=1024)
    chosen = made.parse_args()
    in_loop = mock.patch("opdlm.deploy.run.ending.in_daemon_thread", lambda fit: asyncio.ensure_future(fit()))
    with in_loop, mock.patch("opdlm.actors.queue.actor.ray.put", lambda pack: pack):
        quick = Stages(0, 0.001, 1, 0)
        many = [(chosen.slots, 1.0)] * chosen.actors
        large = run(Shape(1, 3, chosen.round, chosen.actors, 4), quick, many, chosen.slots)
        one = run(Shape(0, 1, 256), quick, [(32, 1.0)], 32)
        unequal = [(32, 1.0), (32, 2.0)]
        shared = run(Shape(0, 1, 4096, 2), quick, unequal, 32)
        scored = run(Shape(0, 1, 512, 1, 4), Stages(0, 2_000, 1, 0), [(32, 1.0)], 32)
    busy = list(scored["teacher_seconds"].values())
    figures = {
        "driver, queue and fakes: CPU ms per sample": 1e3 * large["cpu_seconds_per_sample"],
        "occupancy until the last request is dealt, 1 round of 256 on 32 slots": one["occupancy"],
        "2 actors, one half as fast, 1 round of 4,096: time against ideal sharing": shared["decoded_at"]
        / ideal_seconds(shared["lengths"], unequal),
        "4 teachers behind 1 actor: busy time of the least busy, against the mean": min(busy) * len(busy) / sum(busy),
    }
    table = Table("measure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}")
    Console(width=120).print(table, f"written: {write_json('flow', figures)}")


if __name__ == "__main__":
    main()
