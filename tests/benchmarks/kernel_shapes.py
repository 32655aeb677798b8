"""What a product of a new shape costs a CPU in bfloat16: seconds, and memory that stays.

    python -m tests.benchmarks.kernel_shapes [--steps 300] [--multiples 1 64] [--threads 1]

Forward and backward of three linear layers of SmolLM2-135M's widths with 300 to 1,500 tokens, drawn anew each step and
padded to a multiple; each case in a process of its own. Goal: a learner's process does not grow (`LINE_MULTIPLE`,
`learner/packing.py`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time

import psutil
import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.measure import write_json

WIDTHS = [(576, 1536), (1536, 576), (576, 192)]


def steps(multiple: int, count: int, threads: int) -> dict[str, float]:
    """Runs the steps of one case.

    Returns: `seconds` of all steps, `shapes` that they had, and `grown_mib`, by how much resident memory is larger
    after them than after the first one.
    """
    torch.set_num_threads(threads)
    draws, shapes = random.Random(0), set()
    layers = [torch.nn.Linear(*widths, bias=False, dtype=torch.bfloat16) for widths in WIDTHS]
    process = psutil.Process()
    first, started = 0, time.perf_counter()
    for step in range(count):
        tokens = draws.randint(300, 1500)
        tokens += -tokens % multiple
        shapes.add(tokens)
        hidden = torch.randn(tokens, WIDTHS[0][0], dtype=torch.bfloat16, requires_grad=True)
        for layer in layers:
            hidden = layer(hidden)
        hidden.float().square().sum().backward()
        for layer in layers:
            layer.weight.grad = None
        if step == 0:
            first = process.memory_info().rss
    grown = process.memory_info().rss - first
    return {"seconds": time.perf_counter() - started, "shapes": len(shapes), "grown_mib": grown / 2**20}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=300, help="steps of each case (default: %(default)s)")
    arguments.add_argument("--multiples", type=int, nargs="+", default=[1, 64], help="(default: %(default)s)")
    arguments.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    options = arguments.parse_args()
    table = Table("tokens padded to a multiple of", "shapes", "seconds", "memory that stays, MiB")
    results = {}
    for multiple in options.multiples:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(steps, (multiple, options.steps, options.threads))
        results[str(multiple)] = found
        table.add_row(str(multiple), f"{found['shapes']:.0f}", f"{found['seconds']:.1f}", f"{found['grown_mib']:.0f}")
    Console().print(table)
    write_json("kernel_shapes", results)


if __name__ == "__main__":
    main()
