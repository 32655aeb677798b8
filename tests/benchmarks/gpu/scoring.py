"""Scoring on a GPU: tokens per second of each kind of target against a bare forward, and as a share of the card's rate.

python -m tests.benchmarks.gpu.scoring [--response 512] [--count 64] [--device cpu --tiny]
"""

from __future__ import annotations

import numpy as np

from opdlm.actors.teacher.scoring import score
from opdlm.common.types import Trajectory
from tests.benchmarks.decoder import MASK
from tests.benchmarks.gpu.card import Journal, flops_per_second, options, random_model, timed
from tests.benchmarks.teacher import TOP_K, P, bare
from tests.tiny import trajectory

BATCH_TOKENS = 16384


def trajectories(count: int, response: int) -> list[Trajectory]:
    """Trajectories of random tokens."""
    rng = np.random.default_rng(0)
    return [
        trajectory(list(rng.integers(3, MASK, P)), list(rng.integers(3, MASK, response)), [1] * response)
        for _ in range(count)
    ]


def main() -> None:
    """Measures."""
    arguments = options(__doc__)
    arguments.add_argument("--response", type=int, default=512)
    arguments.add_argument("--count", type=int, default=64)
    chosen = arguments.parse_args()
    if chosen.tiny:
        chosen.response, chosen.count = 16, 4
    device, shape = chosen.device, "tiny" if chosen.tiny else "0.6B"
    journal, peak = Journal(chosen.journal, "scoring", device), flops_per_second(device, chosen.tiny)
    model, asked = random_model(shape, device), trajectories(chosen.count, chosen.response)
    tokens = sum(P + t.response_length - 1 for t in asked)
    layers = 2 * tokens * sum(p.numel() for p in model.model.layers.parameters())
    arms = {
        "bare forward": lambda: bare(model, asked, logits=False, most_tokens=BATCH_TOKENS),
        "hidden": lambda: score(model, asked, "hidden", TOP_K, BATCH_TOKENS),
        "topk": lambda: score(model, asked, "topk", TOP_K, BATCH_TOKENS),
    }
    for name, run in arms.items():
        run()
        seconds = min(timed(run, device) for _ in range(chosen.repetitions))
        journal.add(
            shape=shape,
            arm=name,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            utilisation_of_layers=layers / seconds / peak,
        )


if __name__ == "__main__":
    main()
