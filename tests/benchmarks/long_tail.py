"""Attention over sequences of very different lengths: in parts of like length, or in one part as wide as the longest.

    make bench        # or: python -m tests.benchmarks.long_tail [--repetitions 5]

Random weights in the shape of Qwen3-0.6B, bfloat16, static decoding after prompts of the lengths below; a long prompt
stands for a response that is long already. The two arms differ in the smallest width of a part
(`actors/rollout/attention.py`). The time of a step is the median over the steps of a call. There is no prefill, because
attention over zeros takes the same time.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.types import RolloutRequest
from tests.benchmarks.decoder import MASK, S, random_model
from tests.benchmarks.measure import Ratio, back_to_back, parser, write_json

STEPS = 16
LENGTHS = {
    "equal, short": [64] * 8,
    "equal, long": [1_500] * 8,
    "one long": [64] * 7 + [1_500],
    "long tail": [60, 110, 170, 240, 330, 480, 800, 1_900],
}


def step_seconds(model: Any, lengths: list[int], narrowest: int) -> float:
    """Median seconds of a denoising step. `narrowest`: width below which nothing is split, in positions."""
    rng, seconds = np.random.default_rng(0), []
    requests = [
        RolloutRequest(i, str(i), rng.integers(0, MASK, n).astype(np.int32), STEPS, seed=i)
        for i, n in enumerate(lengths)
    ]
    how = DecodeSettings(block_size=S, strategy="low_confidence_static", ignore_eos=True)
    decoder = BlockDecoder(model, how, MASK, [0], len(requests))
    denoise = decoder._denoise

    def timed(*arguments: Any) -> tuple[list[int], int]:
        started = time.perf_counter()
        finished = denoise(*arguments)
        seconds.append(time.perf_counter() - started)
        return finished

    with (
        mock.patch.object(decoder, "_denoise", timed),
        mock.patch("opdlm.actors.rollout.decoder.prefill", return_value=0),
        mock.patch("opdlm.actors.rollout.attention.NARROWEST_PART", narrowest),
    ):
        decoder.decode(requests)
    return median(seconds)


def main() -> None:
    """Measures, prints a table, writes JSON."""
    chosen = parser(__doc__).parse_args()
    torch.set_num_threads(chosen.threads)
    model, lines = random_model(), []
    table = Table(title=f"a denoising step, batch 8, {chosen.threads} threads, {chosen.repetitions} repetitions")
    for name in ("lengths", "one part, ms", "parts, ms", "times faster"):
        table.add_column(name, justify="right")
    for name, lengths in LENGTHS.items():
        arms = {
            "one": lambda n=lengths: step_seconds(model, n, 1 << 30),
            "parts": lambda n=lengths: step_seconds(model, n, 256),
        }
        found = back_to_back(arms, chosen.repetitions)
        faster = Ratio([a / b for a, b in zip(found["one"], found["parts"], strict=True)])
        lines.append({"lengths": lengths, "seconds": found, "times_faster": faster.values})
        table.add_row(name, *(f"{1e3 * median(found[arm]):.0f}" for arm in ("one", "parts")), str(faster))
    console = Console(width=120)
    console.print(table, f"written: {write_json('long_tail', lines)}")


if __name__ == "__main__":
    main()
