"""Scoring trajectories against a bare forward of the same tokens, and the bytes of each kind of target.

    make bench        # or: python -m tests.benchmarks.teacher [--repetitions 5] [--threads 2]

The bare forward is `model(ids, output_hidden_states=True)` of transformers, which computes all hidden states and all
logits; a second bare forward computes no logits. Random weights in the shape of Qwen3-0.6B, bfloat16. All arms have the
same batches.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from opdlm.actors.teacher.scoring import score
from opdlm.common.batches import batches_by_length
from opdlm.common.types import Trajectory
from tests.benchmarks.decoder import MASK, random_model
from tests.benchmarks.measure import Ratio, back_to_back, parser, write_json

P, RESPONSES, BATCH_TOKENS, TOP_K = 64, (40, 64, 100, 128, 180, 256), 1024, 16
KINDS = ("hidden", "topk", "logits")


def trajectories() -> list[Trajectory]:
    """Trajectories of random tokens. Scoring reads nothing else of them."""
    rng = np.random.default_rng(0)
    return [
        Trajectory(
            index=index,
            prompt_id=str(index),
            prompt_ids=rng.integers(0, MASK, P).astype(np.int32),
            response_ids=rng.integers(0, MASK, length).astype(np.int32),
            reveal_step=np.ones(length, np.int32),
            response_length=length,
            weight_version=0,
            finish_reason="length",
            denoising_steps=length,
        )
        for index, length in enumerate(RESPONSES)
    ]


@torch.inference_mode()
def bare(model: Any, asked: list[Trajectory], logits: bool, most_tokens: int = BATCH_TOKENS) -> None:
    """Runs the bare forwards of all trajectories. `logits`: at every position, not only the last."""
    lengths = [P + t.response_length - 1 for t in asked]
    for batch in batches_by_length(lengths, most_tokens):
        ids = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : lengths[i]] = torch.from_numpy(np.concatenate([asked[i].prompt_ids, asked[i].response])[:-1])
        ids = ids.to(model.device)
        model(input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=0 if logits else 1)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Measures, prints a table, writes JSON."""
    options = parser(__doc__)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    model, asked = random_model(), trajectories()
    arms = {
        "bare forward": lambda: bare(model, asked, logits=True),
        "bare forward without logits": lambda: bare(model, asked, logits=False),
        **{f"score, {kind}": lambda kind=kind: score(model, asked, kind, TOP_K, BATCH_TOKENS) for kind in KINDS},
    }
    seconds = back_to_back({name: lambda run=run: timed(run) for name, run in arms.items()}, chosen.repetitions)
    tokens, positions = sum(P + t.response_length - 1 for t in asked), sum(t.response_length for t in asked)
    weights = {
        f"score, {kind}": sum(len(pickle.dumps(t, protocol=5)) for t in score(model, asked, kind, TOP_K, BATCH_TOKENS))
        for kind in KINDS
    }
    title = f"{tokens:,} tokens in {len(asked)} trajectories, bfloat16, {chosen.threads} threads"
    table = Table(title=f"{title}, {chosen.repetitions} repetitions")
    table.add_column("arm")
    for name in ("tokens/s", "times the bare forward's speed", "without its logits", "bytes per response token"):
        table.add_column(name, justify="right")
    lines = []
    for name, taken in seconds.items():
        ratios = [
            Ratio([b / own for own, b in zip(taken, seconds[base], strict=True)])
            for base in ("bare forward", "bare forward without logits")
        ]
        wire = weights[name] / positions if name in weights else None
        lines.append({"arm": name, "seconds": taken, "bytes_per_response_token": wire})
        table.add_row(
            name,
            f"{tokens / Ratio(taken).median:,.0f}",
            *(str(ratio) for ratio in ratios),
            f"{wire:,.0f}" if wire else "",
        )
    console = Console(width=150)
    console.print(table)
    console.print(f"written: {write_json('teacher', {'title': title, 'lines': lines})}")


if __name__ == "__main__":
    main()
