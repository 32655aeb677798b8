"""Continuous decoding of responses with a long tail, against an older commit that decodes call by call.

    make bench        # or: python -m tests.benchmarks.streaming [--staleness 1] [--width 1024 --layers 28]

One actor of 32 slots. Lengths are lognormal (median an eighth of the limit, sigma 1, cut at the limit), made by an end
token that is forced where a sequence has its length. Two cases: `max_staleness: 1`, eight rounds of 32, where a round
may begin once the round before the last one has ended (weights come at once, and sequences go on with them); and
`max_staleness: 0`, one round of 256, which the older commit decodes with `prompts_per_call: 32`. The older commit runs
in a process of its own, from `git archive`, in turn with ours.

Tokens per second are those of this machine, where a forward of few sequences takes less time than one of many; on a
device where it takes as long, the number of forwards decides. The share of the best schedule is in denoising steps: a
lower bound of any schedule that knows all lengths, over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.denoise import Denoiser
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.types import RolloutRequest
from tests import REPOSITORY
from tests.benchmarks import forced_lengths
from tests.benchmarks.forced_lengths import END, P, S, force_ends, lognormal, random_model, requests
from tests.benchmarks.measure import Ratio, parser, write_json

BEFORE = "1d24264"
SLOTS = 32
CASES = {"staleness 1, 8 rounds of 32": (1, 8, 32), "staleness 0, 1 round of 256": (0, 1, 256)}


def ours(model: Any, rounds: list[list[int]], staleness: int, limit: int) -> dict[str, float]:
    """Decodes the rounds as the run's loops would with a learner that takes no time."""
    how = DecodeSettings(block_size=S, strategy="low_confidence_static")
    decoder = BlockDecoder(model, how, model.config.vocab_size - 1, [END], SLOTS)
    decoder.decode(requests(RolloutRequest, [1] * 4, 8))  # warms up
    left = [len(round_) for round_ in rounds]
    started, forwards, trained, begun, tokens = time.perf_counter(), decoder.forwards, 0, 0, 0
    full = occupied = 0
    while trained < len(rounds):
        while begun < min(trained + staleness + 1, len(rounds)):
            first = sum(map(len, rounds[:begun]))
            decoder.add(requests(RolloutRequest, rounds[begun], limit, first))
            begun += 1
        ended = decoder.step()
        if decoder.waiting:  # until the last request is dealt
            full, occupied = full + SLOTS, occupied + decoder.occupied + len(ended)
        tokens += sum(trajectory.response_length for trajectory in ended)
        for trajectory in ended:
            left[trajectory.index // len(rounds[0])] -= 1
        before = trained
        while trained < len(rounds) and left[trained] == 0:
            trained += 1
        if trained > before:
            decoder.use_weights(trained)
    seconds, made = time.perf_counter() - started, decoder.forwards - forwards
    best = best_steps(rounds, staleness)
    return {"seconds": seconds, "tokens": tokens, "forwards": made, "occupancy": occupied / full, "best": best / made}


def before(rounds: list[list[int]], model: dict[str, int], limit: int, threads: int, tree: str) -> dict[str, float]:
    """The older commit: calls of 32 prompts, one after the other."""
    flat = [length for round_ in rounds for length in round_]
    calls = [flat[i : i + SLOTS] for i in range(0, len(flat), SLOTS)]
    task = {"calls": calls, "model": model, "limit": limit, "threads": threads, "slots": SLOTS}
    done = subprocess.run(
        [sys.executable, str(Path(forced_lengths.__file__))],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=True,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": tree},
    )
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def best_steps(rounds: list[list[int]], staleness: int) -> int:
    """Steps that any schedule needs at least: all slots full, and a round after the last of the one it waits for.

    A sequence of n tokens takes as many steps as its blocks have positions: one token is revealed a step.
    """
    steps = [[-(-length // S) * S for length in round_] for round_ in rounds]
    ends: list[int] = []
    for i, round_ in enumerate(steps):
        begins = ends[i - staleness - 1] if i > staleness else 0
        ends.append(begins + max(max(round_), -(-sum(round_) // SLOTS)))
    return max(*ends, -(-sum(map(sum, steps)) // SLOTS))


def main() -> None:
    """Measures, prints a table, writes JSON."""
    made = parser(__doc__)
    made.add_argument("--width", type=int, default=64)
    made.add_argument("--layers", type=int, default=2)
    made.add_argument("--vocabulary", type=int, default=512)
    made.add_argument("--limit", type=int, default=1024, help="longest response in tokens")
    made.add_argument("--staleness", type=int, choices=(0, 1), help="one of the two cases alone")
    chosen = made.parse_args()
    torch.set_num_threads(chosen.threads)
    shape = {"width": chosen.width, "layers": chosen.layers, "vocabulary": chosen.vocabulary}
    shape["positions"] = P + chosen.limit + 2 * S
    table = Table(title=f"{chosen.repetitions} repetitions; median (range)")
    arms = f"{BEFORE}, tokens/s", "now, tokens/s", "times faster", "times fewer forwards"
    for name in ("case", *arms, "share of the best", "occupancy"):
        table.add_column(name, justify="right")
    lines = []
    with tempfile.TemporaryDirectory() as tree:
        archive = subprocess.run(["git", "archive", BEFORE], capture_output=True, check=True, cwd=REPOSITORY)
        subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
        for name, (staleness, count, size) in CASES.items():
            if chosen.staleness not in (None, staleness):
                continue
            line = measure(
                chosen, shape, [lognormal(size, chosen.limit, seed) for seed in range(count)], staleness, tree
            )
            lines.append({"case": name, **line})
            table.add_row(
                name,
                f"{median(line['before']):,.0f}",
                f"{median(line['now']):,.0f}",
                str(Ratio([b / a for a, b in zip(line["before"], line["now"], strict=True)])),
                f"{median(line['fewer_forwards']):.2f}",
                f"{median(line['best']):.3f}",
                f"{median(line['occupancy']):.3f}",
            )
    Console(width=120).print(table, f"written: {write_json('streaming', lines)}")


def measure(
    chosen: argparse.Namespace, shape: dict[str, int], rounds: list[list[int]], staleness: int, tree: str
) -> dict[str, list[float]]:
    """Both arms in turn: tokens per second, and of ours the shares."""
    model, drawn = random_model(**shape), Denoiser._candidates
    force_ends(Denoiser, [length for round_ in rounds for length in round_])
    found: dict[str, list[float]] = {"before": [], "now": [], "fewer_forwards": [], "best": [], "occupancy": []}
    for _ in range(chosen.repetitions):
        old = before(rounds, shape, chosen.limit, chosen.threads, tree)
        new = ours(model, rounds, staleness, chosen.limit)
        assert old["tokens"] == new["tokens"] == sum(map(sum, rounds)), "both arms decode the same lengths"
        found["before"].append(old["tokens"] / old["seconds"])
        found["now"].append(new["tokens"] / new["seconds"])
        found["fewer_forwards"].append(old["forwards"] / new["forwards"])
        found["best"].append(new["best"])
        found["occupancy"].append(new["occupancy"])
    Denoiser._candidates = drawn  # type: ignore[method-assign]
    return found


if __name__ == "__main__":
    main()
