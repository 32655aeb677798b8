"""Memory of the key/value cache against the tokens that are alive, and equal-length decoding before and after.

    make bench        # or: python -m tests.benchmarks.cache [--only memory | equal] [--before COMMIT]

Memory: responses of lognormal length (median 1/8 of the limit, sigma 1, cut at the limit) on 32 slots of a small model;
the benchmark ends each at its length, which the decoder cannot know. In a bounded cache, the ratio is its positions to
those of the sequences in it, a mean over the steps in which requests wait for room in it. Without a bound, or where
nobody waits, it is the positions at the end to the most that were alive at once.

Equal lengths: random weights in the shape of Qwen3-0.6B, bfloat16, static decoding, in the code of another commit
(dense cache) and in this one, in turn, each in a process of its own. The time of a step is a mean over all steps but
the first, which has the prefill; so it contains what moving sequences takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen3Config

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.types import RolloutRequest
from tests.benchmarks.measure import OUT, Ratio, parser, write_json

P, SLOTS, V = 64, 32, 512
EQUAL = {"32 x 64, 128 more": (32, 64, 128), "8 x 1,500, 64 more": (8, 1_500, 64)}
"""Sequences, tokens of each prompt, tokens of each response."""
_EQUAL_RUN = """
import json, sys, time
import numpy as np, torch
from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.types import RolloutRequest
from tests.benchmarks.decoder import MASK, S, random_model

threads, batch, prompt, limit = map(int, sys.argv[1:])
torch.set_num_threads(threads)
rng, starts = np.random.default_rng(0), []
asked = [RolloutRequest(i, str(i), rng.integers(0, MASK, prompt).astype(np.int32), limit, i) for i in range(batch)]
how = DecodeSettings(block_size=S, strategy="low_confidence_static", ignore_eos=True)
BlockDecoder(random_model(), how, MASK, [0], batch).decode(asked, update_weights=lambda: starts.append(time.time()))
print(json.dumps((starts[-1] - starts[1]) / (len(starts) - 2)))
"""


def small_model() -> Any:
    """A random model of two layers, whose forward is quick."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Qwen3Config(vocab_size=V, max_position_embeddings=1 << 17, **shape, **heads)
    ).eval()


def lognormal(count: int, limit: int) -> list[int]:
    """Lengths of responses: median 1/8 of the limit, sigma 1, cut at the limit."""
    lengths = np.random.default_rng(0).lognormal(np.log(limit / 8), 1, count)
    return np.clip(lengths.astype(int), 1, limit).tolist()


def memory(model: Any, limit: int, count: int, cache_tokens: int | None) -> dict[str, Any]:
    """Decodes `count` sequences; returns what the cache had and what was alive in it."""
    rng, lengths = np.random.default_rng(1), lognormal(count, limit)
    asked = [RolloutRequest(i, str(i), rng.integers(0, V, P).astype(np.int32), limit, seed=i) for i in range(count)]
    how = DecodeSettings(strategy="low_confidence_dynamic", threshold=0.02, temperature=1.0, ignore_eos=True)
    cache = SlotCache(model, cache_tokens)
    decoder = BlockDecoder(model, how, V - 1, [0], SLOTS, cache=cache)
    denoise = decoder._denoise

    def ends_too_soon_to_know(slots: Any, *arguments: Any) -> tuple[list[int], int]:
        finished, tokens = denoise(slots, *arguments)
        decoded = slots.host_starts[: slots.occupied] - P
        ended = {row for row, request in enumerate(slots.requests) if decoded[row] >= lengths[request.index]}
        return sorted(ended.union(finished)), tokens

    decoder._denoise = ends_too_soon_to_know  # type: ignore[assignment]
    decoder.add(asked)
    alive, crowded, tokens = [], [], 0
    while decoder.occupied or decoder.waiting:
        tokens += sum(len(trajectory.response_ids) for trajectory in decoder.step())
        alive.append(decoder.live_tokens)
        if decoder.occupied and decoder.waiting and not decoder._fit([decoder._waiting[0]]):
            crowded.append(cache.positions / decoder.live_tokens)
    return {
        "bound": cache_tokens,
        "positions": cache.positions,
        "alive_at_most": max(alive),
        "ratio": float(np.mean(crowded)) if crowded else cache.positions / max(alive),
        "steps": len(alive),
        "put_back": decoder.put_back,
        "forward_tokens_per_token": decoder.forward_tokens / tokens,
    }


def show_memory(limit: int, count: int, console: Console) -> list[dict[str, Any]]:
    """The table of the cache's memory, without a bound and with smaller and smaller ones."""
    model = small_model()
    lines = [memory(model, limit, count, None)]
    most = lines[0]["alive_at_most"]
    lines += [memory(model, limit, count, max(int(share * most), P + limit + 4)) for share in (1.15, 0.75, 0.5)]
    dense = SLOTS * (P + limit)
    table = Table(
        title=f"{count} responses of 1 to {limit:,} tokens, {SLOTS} slots; slots x longest: {dense:,} positions"
    )
    for name in (
        "bound",
        "positions",
        "alive at most",
        "positions / alive",
        "steps",
        "put back",
        "forward tokens a token",
    ):
        table.add_column(name, justify="right")
    for line in lines:
        figures = (f"{line['ratio']:.3f}", str(line["steps"]), str(line["put_back"]))
        bound, work = line["bound"] or "none", f"{line['forward_tokens_per_token']:.2f}"
        table.add_row(str(bound), f"{line['positions']:,}", f"{line['alive_at_most']:,}", *figures, work)
    console.print(table)
    return lines


def before_tree(commit: str) -> Path:
    """The files of another commit."""
    tree = (OUT / f"tree-{commit}").resolve()
    tree.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(["git", "archive", commit], check=True, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(tree)], input=packed.stdout, check=True)
    return tree


def show_equal(commit: str, options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """The table of a step's time at equal lengths, before and after."""

    def seconds(tree: Path, sizes: tuple[int, int, int]) -> float:
        command = [sys.executable, "-c", _EQUAL_RUN, *map(str, (options.threads, *sizes))]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        ran = subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(ran.stdout.splitlines()[-1])

    trees = {"before": before_tree(commit), "after": Path.cwd()}
    table = Table(
        title=f"a denoising step, equal lengths, {options.threads} threads, {options.repetitions} repetitions"
    )
    for name in ("sequences", f"{commit}, ms", "now, ms", "now / before"):
        table.add_column(name, justify="right")
    lines = []
    for name, sizes in EQUAL.items():
        found: dict[str, list[float]] = {arm: [] for arm in trees}
        for _ in range(options.repetitions):  # each run is a process, so none warms up another
            for arm, tree in trees.items():
                found[arm].append(seconds(tree, sizes))
        ratio = Ratio([now / then for now, then in zip(found["after"], found["before"], strict=True)])
        lines.append({"sequences": name, "seconds": found, "ratio": ratio.values})
        table.add_row(name, *(f"{1e3 * Ratio(found[arm]).median:.0f}" for arm in ("before", "after")), str(ratio))
    console.print(table)
    return lines


def main() -> None:
    """Measures, prints tables, writes JSON."""
    made = parser(__doc__)
    made.add_argument("--only", choices=["memory", "equal"])
    made.add_argument("--before", default="1d24264", help="commit of the other arm (default: %(default)s)")
    made.add_argument("--limit", type=int, default=2048, help="longest response of the memory's part")
    made.add_argument("--count", type=int, default=256, help="responses of the memory's part")
    chosen = made.parse_args()
    torch.set_num_threads(chosen.threads)
    console, results = Console(width=150), {}
    if chosen.only != "equal":
        results["memory"] = show_memory(chosen.limit, chosen.count, console)
    if chosen.only != "memory":
        results["equal"] = show_equal(chosen.before, chosen, console)
    console.print(f"written: {write_json('cache', results)}")


if __name__ == "__main__":
    main()
