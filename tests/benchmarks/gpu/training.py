"""A training row on a GPU: model FLOP utilisation, peak memory against the direct formulation, compile times.

    python -m tests.benchmarks.gpu.training [--response 1024] [--rows 8] [--device cpu --tiny]

Forward and backward of the learner's module, without the optimizer, in the shape of Qwen3-0.6B, bfloat16. The FLOPs
counted are those that the mathematics needs: the layers for every token, attention for the pairs that see each other,
student's and teacher's output matrix at loss positions. Their rate is given as a share of what the card reaches in one
large matrix product. The direct formulation is that of `learner_step.py`, on one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from opdlm.common.masks import training_mask
from opdlm.common.types import HiddenTargets, ScoredTrajectory
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import MicroBatch, collate, pack
from opdlm.learner.rows import build_rows
from opdlm.learner.targets import PositionTargets, gather_targets
from tests.benchmarks.decoder import MASK, V
from tests.benchmarks.gpu.card import Journal, flops_per_second, options, random_model, timed, wait
from tests.benchmarks.learner_step import GRID, OBJECTIVE, direct
from tests.tiny import trajectory

P, CHUNK = 128, 1024


def micro_batch(count: int, response: int, head: torch.Tensor, packed: bool = True) -> tuple[MicroBatch, Any]:
    """Rows of random tokens, one state of every block, and random hidden states as targets, on the head's device."""
    rng, rows = np.random.default_rng(1), []
    for _ in range(count):
        steps = np.concatenate([4 * block + 1 + rng.permutation(4) for block in range(response // 4)]).tolist()
        one = trajectory(list(rng.integers(3, MASK, P)), list(rng.integers(3, MASK, response)), steps)
        hidden = HiddenTargets(rng.standard_normal((response, head.shape[1]), dtype=np.float32))
        rows += build_rows(ScoredTrajectory(one, hidden), GRID, OBJECTIVE, MASK, rng)
    targets = gather_targets(rows, head, OBJECTIVE).to(head.device)
    return (pack(rows) if packed else collate(rows)).to(head.device), targets


def flops(model: Any, batch: MicroBatch) -> float:
    """Of a forward and backward: two for each weight and token, and twice that in the backward pass."""
    config, tokens, positions = model.config, batch.input_ids.numel(), len(batch.loss_row)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    pairs = int(training_mask(batch.samples, batch.copies, batch.blocks).sum())
    attention = 4 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    output = V * config.hidden_size * positions
    return 3 * (2 * layers * tokens + attention + 2 * output) + 2 * output


def peak_bytes(run: Callable[[], Any], model: Any, device: str) -> int | None:
    """The most that torch allocates in a call, the model's gradients included, beside what there was before.

    None on the CPU.
    """
    model.zero_grad(set_to_none=True)
    if device != "cuda":
        run()
        return None
    torch.cuda.empty_cache()
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    wait(device)
    return torch.cuda.max_memory_allocated() - before


def ours(module: DistillModule, batch: MicroBatch, targets: PositionTargets) -> Callable[[], None]:
    """Forward and backward of the learner's module, gradients allocated anew."""
    count = len(batch.loss_row)
    weights = torch.full((count,), 1 / count, device=batch.input_ids.device)

    def run() -> None:
        module.zero_grad(set_to_none=True)
        module(batch, targets, weights)[0].backward()

    return run


def main() -> None:
    """Measures each attention, then memory, then a second shape, which compiles again."""
    arguments = options(__doc__)
    arguments.add_argument("--response", type=int, default=1024, help="R")
    arguments.add_argument("--rows", type=int, default=8)
    chosen = arguments.parse_args()
    if chosen.tiny:
        chosen.response, chosen.rows = 32, 2
    shape, device = "tiny" if chosen.tiny else "0.6B", chosen.device
    journal, peak = Journal(chosen.journal, "training", device), flops_per_second(device, chosen.tiny)
    journal.add(matrix_teraflops_per_second=peak / 1e12)
    head = torch.randn(V, 64 if chosen.tiny else 1024, dtype=torch.bfloat16, device=device)
    one, one_targets = micro_batch(1, chosen.response, head)
    for attention in ("flex_attention", "sdpa") if device == "cuda" else ("sdpa",):
        model = random_model(shape, device, attention).train()
        module = DistillModule(model, OBJECTIVE, CHUNK, attention)
        for rows, response in ((chosen.rows, chosen.response), (chosen.rows, chosen.response // 2 + 4)):
            batch, targets = micro_batch(rows, response, head)
            run = ours(module, batch, targets)
            firsts = [timed(run, device) for _ in range(2)]
            seconds = min(timed(run, device) for _ in range(chosen.repetitions))
            work = flops(model, batch)
            journal.add(
                shape=shape,
                attention=attention,
                rows=rows,
                response=response,
                tokens=batch.input_ids.numel(),
                seconds=seconds,
                tokens_per_second=batch.input_ids.numel() / seconds,
                utilisation=work / seconds / peak,
                first_seconds=firsts[0],
                second_seconds=firsts[1],
                peak_gib=(peak_bytes(run, model, device) or 0) / 2**30,
            )
        least = peak_bytes(ours(module, one, one_targets), model, device)
        journal.add(attention=attention, rows=1, response=chosen.response, peak_gib=(least or 0) / 2**30)
        del module, model
    plain = random_model(shape, device).train()
    dense, dense_targets = micro_batch(1, chosen.response, head, packed=False)
    dense_targets = replace(dense_targets, head=head)

    def directly() -> None:
        plain.zero_grad(set_to_none=True)
        direct(plain, dense, dense_targets).backward()

    most = peak_bytes(directly, plain, device)
    ratio = most / least if most is not None and least is not None else None
    journal.add(attention="direct", rows=1, response=chosen.response, peak_gib=(most or 0) / 2**30, times_ours=ratio)


if __name__ == "__main__":
    main()
