"""Decoding against the time that memory bandwidth allows, training against the time that FLOP/s allow; GPU or CPU.

    python -m tests.benchmarks.floors [--repetitions 5]

Bandwidth is measured by copying a large tensor, FLOP/s by multiplying large matrices, both in the same process. The
floor of a denoising forward is the time to read all weights once. The floor of a training row is the time for the
products in its layers, for the visible pairs in attention, and with the output matrices of student and teacher. On a
GPU: random weights in the shape of Qwen3-0.6B, bfloat16, decoding with and without CUDA graphs. On a CPU: the same
decoding, and training of a small model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from opdlm.actors.rollout.cuda_graphs import CudaGraphs
from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.masks import training_mask
from opdlm.learner.distill import DistillModule
from tests.benchmarks import learner_step
from tests.benchmarks.decoder import EQUAL, MASK, S, random_model, requests
from tests.benchmarks.measure import Ratio, parser, write_json

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BATCHES = [1, 8, 64] if CUDA else [1, 8]
RESPONSE = 1024 if CUDA else 256


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that one call takes, until the device has finished it."""
    if CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones((4 << 30) // 4 if CUDA else (1 << 29) // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(5))


def flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second in a product of square matrices."""
    size = 8192 if CUDA else 2048
    one = torch.randn(size, size, device=DEVICE).to(dtype)
    return 2 * size**3 / min(seconds(lambda: one @ one) for _ in range(5))


def decoding(repetitions: int) -> list[dict[str, Any]]:
    """Seconds of a denoising step, and the floor: the seconds in which the weights can be read."""
    model = random_model().to(DEVICE)
    floor = sum(p.nbytes for p in model.parameters()) / bandwidth()
    lines = []
    for batch in BATCHES:
        for graphs in (False, True) if CUDA else (False,):
            how = DecodeSettings(block_size=S, strategy="low_confidence_static", ignore_eos=True)
            decoder = BlockDecoder(model, how, MASK, [0], batch, CudaGraphs if graphs else None)
            asked = requests([EQUAL] * batch)
            decoder.decode(asked)  # warms up, and records the CUDA graphs
            each = []
            for _ in range(repetitions):
                _, stats = decoder.decode(asked)
                each.append(stats.seconds / stats.forwards)
            times = [s / floor for s in each]
            lines.append({"batch": batch, "graphs": graphs, "seconds": each, "floor": floor, "times": times})
    return lines


def training(repetitions: int) -> dict[str, Any]:
    """Seconds of a row's forward and backward, and the floor: its products at the FLOP/s of a large product."""
    dtype = torch.bfloat16 if CUDA else torch.float32
    student = (random_model() if CUDA else learner_step.model(256)).to(DEVICE, dtype).train()
    config = student.config
    width = config.hidden_size
    head = (torch.randn(learner_step.V, width) / width**0.5).to(DEVICE, dtype)
    batch, targets = learner_step.row(width, RESPONSE, head)
    module = DistillModule(student, learner_step.OBJECTIVE, 1024, "flex_attention" if CUDA else "sdpa")
    if CUDA:
        student.set_attn_implementation("flex_attention")
    n, pairs = len(batch.loss_row), int(training_mask(batch.samples, batch.copies, batch.blocks).sum())
    batch, targets, weights = batch.to(DEVICE), targets.to(DEVICE), torch.full((n,), 1 / n, device=DEVICE)
    layers = sum(p.numel() for p in student.model.layers.parameters() if p.dim() > 1)
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    # A multiplication and its addition are 2 FLOP. The backward pass takes twice as many; the teacher has none.
    needed = 6 * layers * batch.input_ids.numel() + 12 * heads * pairs + (6 + 2) * n * width * learner_step.V
    floor = needed / flops(dtype)

    def step() -> None:
        student.zero_grad(set_to_none=True)
        module(batch, targets, weights)[0].backward()

    step()
    each = [seconds(step) for _ in range(repetitions)]
    return {"response": RESPONSE, "flop": needed, "seconds": each, "floor": floor, "times": [s / floor for s in each]}


def main() -> None:
    """Measures, prints a table, writes JSON."""
    options = parser(__doc__)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    name = torch.cuda.get_device_name() if CUDA else f"CPU, {chosen.threads} threads"
    table = Table(title=f"times the floor, {name}, {chosen.repetitions} repetitions")
    for column in ("what", "ms", "floor, ms", "times the floor"):
        table.add_column(column, justify="right")
    decoded, trained = decoding(chosen.repetitions), training(chosen.repetitions)
    for line in decoded:
        what = f"denoising step, batch {line['batch']}{', CUDA graphs' if line['graphs'] else ''}"
        table.add_row(what, *_row(line))
    table.add_row(f"training row, R = {trained['response']:,}, {trained['flop'] / 1e12:.2f} TFLOP", *_row(trained))
    console = Console(width=120)
    console.print(table)
    console.print(f"written: {write_json('floors', {'device': name, 'decoding': decoded, 'training': trained})}")


def _row(line: dict[str, Any]) -> tuple[str, str, str]:
    return f"{1e3 * min(line['seconds']):.1f}", f"{1e3 * line['floor']:.1f}", str(Ratio(line["times"]))


if __name__ == "__main__":
    main()
