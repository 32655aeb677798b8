"""In which order should sequences of unknown length begin? The share of the best schedule that each order reaches.

    make bench        # or: python -m tests.benchmarks.orders [--rounds 20]

One round of 256 on one actor of 32 slots, as the second case of `streaming.py`, in denoising steps without a model. The
best schedule knows all lengths: all slots full, or the longest sequence by itself where that takes longer.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tests.benchmarks.forced_lengths import S, lognormal
from tests.benchmarks.measure import Ratio, write_json
from tests.benchmarks.streaming import SLOTS, best_steps

LIMIT, COUNT = 1024, 256


def in_order(steps: Sequence[int]) -> int:
    """Steps until all have ended, if a free slot takes the next sequence and keeps it until it ends."""
    slots = [0] * SLOTS
    for count in steps:
        heapq.heapreplace(slots, slots[0] + count)
    return max(slots)


def least_decoded_first(steps: Sequence[int], turn: int) -> int:
    """The same, if after every `turn` steps the sequences with the fewest steps are decoded on, whatever that costs."""
    left, taken = [(0, i) for i in range(len(steps))], 0
    while left:
        running = [heapq.heappop(left) for _ in range(min(SLOTS, len(left)))]
        taken += turn
        for done, i in running:
            if steps[i] > done + turn:
                heapq.heappush(left, (done + turn, i))
    return taken


def longest_guess_first(steps: Sequence[int], sigma: float, seed: int) -> int:
    """The same as `in_order`, in the order of guesses that are wrong by a lognormal factor of this sigma."""
    rng = random.Random(seed)
    guessed = sorted(steps, key=lambda count: -count * rng.lognormvariate(0, sigma))
    return in_order(guessed)


def main() -> None:
    """Simulates, prints a table, writes JSON."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=20)
    found: dict[str, list[float]] = {}
    for seed in range(made.parse_args().rounds):
        lengths = lognormal(COUNT, LIMIT, seed)
        steps = [-(-length // S) * S for length in lengths]
        best = best_steps([lengths], 0)
        arms = {
            "as they come (what is built)": in_order(steps),
            "least decoded first, turns of a block": least_decoded_first(steps, S),
            "least decoded first, turns of 32": least_decoded_first(steps, 32),
            "longest first, guesses of sigma 1": longest_guess_first(steps, 1.0, seed),
            "longest first, guesses of sigma 0.5": longest_guess_first(steps, 0.5, seed),
            "longest first, all lengths known": in_order(sorted(steps, reverse=True)),
        }
        for name, taken in arms.items():
            found.setdefault(name, []).append(best / taken)
    table = Table("order", "share of the best schedule, median (range)")
    for name, shares in found.items():
        table.add_row(name, str(Ratio(shares)))
    Console(width=120).print(table, f"written: {write_json('orders', found)}")


if __name__ == "__main__":
    main()
