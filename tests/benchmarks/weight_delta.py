"""The share of the weights that is equal in two pushes, and whether pushing only the differences would be faster.

    make bench        # or: python -m tests.benchmarks.weight_delta [--steps 16]

A random Qwen3 (weights of standard deviation 0.02, about that of pretrained ones) learns random tokens by AdamW on
float32 masters, as DeepSpeed keeps them; a push has the bfloat16 values. There are 16 optimizer steps between two
pushes, as in the paper (128 prompts per round in batches of 8). The first 16 steps are left out, because AdamW's
moments are not yet typical in them.

Then the cost of coding is measured: the sender finds the changed bfloat16 values, the receiver puts them in place (one
bit per value, then the new values), with one thread each. Coding takes time and saves bytes. It saves more time than it
takes on a network that is slower than the last column.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.benchmarks.measure import write_json

RATES = (1e-5, 3e-6, 1e-6)
VALUES = 50_000_000


def repeated(rate: float, steps: int) -> dict[str, float]:
    """Shares of values and of bytes that are equal in two successive pushes, by number format."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def push() -> torch.Tensor:
        for _ in range(steps):
            ids = torch.randint(0, 2048, (8, 64))
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])

    push()
    first, second = push(), push()
    found = {"learning_rate": rate}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        one, two = first.to(dtype), second.to(dtype)
        found[f"values, {name}"] = float((one == two).float().mean())
        found[f"bytes, {name}"] = float((one.view(torch.uint8) == two.view(torch.uint8)).float().mean())
    return found


def coding(repeats: float, repetitions: int) -> dict[str, float]:
    """Cost of coding, per GB of bfloat16 weights of which the share `repeats` is equal to those before.

    Returns: the share of bytes moved, seconds of sender and receiver, and `pays`: the GB/s of a network below which
    coding saves time.
    """
    rng = np.random.default_rng(0)
    old = rng.integers(0, 1 << 16, VALUES, dtype=np.uint16)
    new = np.where(rng.random(VALUES) < repeats, old, old ^ 1)
    held = old.copy()

    def encode() -> tuple[np.ndarray, np.ndarray]:
        changed = new != old
        return np.packbits(changed), new[changed]

    def decode(bits: np.ndarray, values: np.ndarray) -> None:
        held[np.unpackbits(bits, count=VALUES).view(bool)] = values

    sender, (bits, values) = _best(encode, repetitions)
    receiver, _ = _best(lambda: decode(bits, values), repetitions)
    assert np.array_equal(held, new)
    gigabytes = VALUES * 2 / 1e9
    moved, seconds = (bits.nbytes + values.nbytes) / 1e9 / gigabytes, (sender + receiver) / gigabytes
    return {
        "moved": moved,
        "sender": sender / gigabytes,
        "receiver": receiver / gigabytes,
        "pays": (1 - moved) / seconds,
    }


def _best(work: Callable[[], Any], repetitions: int) -> tuple[float, Any]:
    seconds, result = float("inf"), None
    for _ in range(repetitions):
        started = time.perf_counter()
        result = work()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds, result


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps between two pushes")
    parser.add_argument("--repetitions", type=int, default=5)
    chosen = parser.parse_args()
    lines = [repeated(rate, chosen.steps) for rate in RATES]
    table = Table(title=f"equal in two pushes, {chosen.steps} steps apart")
    for name in lines[0]:
        table.add_column(name, justify="right")
    for line in lines:
        rate, *shares = line.values()
        table.add_row(f"{rate:.0e}", *(f"{share:.1%}" for share in shares))
    coded = Table(title="a push of differences in bfloat16, per GB of weights")
    for name in ("values that repeat", "bytes moved", "sender, s", "receiver, s", "pays below, GB/s"):
        coded.add_column(name, justify="right")
    for line in lines:
        line |= coding(line["values, bfloat16"], chosen.repetitions)
        shares = f"{line['values, bfloat16']:.0%}", f"{line['moved']:.0%}"
        coded.add_row(*shares, *(f"{line[name]:.2f}" for name in ("sender", "receiver", "pays")))
    console = Console(width=120)
    console.print(table, coded)
    console.print(f"written: {write_json('weight_delta', lines)}")


if __name__ == "__main__":
    main()
