"""A weight push between processes that share one GPU, through Ray's object store and, where it is installed, NIXL.

    python -m tests.benchmarks.gpu.pushing [--gigabytes 1.2] [--device cpu --tiny]

What is measured, and the bare copies beside it: see `tests/benchmarks/weight_push.py`. 1.2 GB is Qwen3-0.6B in
bfloat16.
"""

from __future__ import annotations

import importlib.util
import statistics

from tests.benchmarks.gpu.card import Journal, options
from tests.benchmarks.weight_push import push


def main() -> None:
    """Measures each transport."""
    arguments = options(__doc__)
    arguments.add_argument("--gigabytes", type=float, default=1.2)
    chosen = arguments.parse_args()
    journal = Journal(chosen.journal, "push", chosen.device)
    size = 0.02 if chosen.tiny else chosen.gigabytes
    installed = importlib.util.find_spec("nixl") is not None
    for transport in ("object_store", "nixl") if installed else ("object_store",):
        pushes = push(size, 1, transport, 1, chosen.repetitions, chosen.device)["pushes"]
        medians = {name: statistics.median(each[name] for each in pushes) for name in pushes[0]}
        journal.add(transport=transport, gigabytes=size, **medians)


if __name__ == "__main__":
    main()
