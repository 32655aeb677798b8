"""How much of the weights a push repeats: what a push of differences alone could leave out.

    make bench        # or: python -m tests.benchmarks.weight_delta [--steps 16]

A random Qwen3 (weights of standard deviation 0.02, as pretrained ones have about) learns random tokens by AdamW on
float32 masters, as DeepSpeed keeps them; a push has the bfloat16 values. One push is 16 optimizer steps, the paper's
128 prompts a round in batches of 8; the first 16 steps, in which AdamW's moments come to be, are left out.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.benchmarks.measure import write_json

RATES = (1e-5, 3e-6, 1e-6)


def repeated(rate: float, steps: int) -> dict[str, float]:
    """Shares of values and of bytes that are equal in two pushes after each other, in each number format."""
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


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps between two pushes")
    chosen = parser.parse_args()
    lines = [repeated(rate, chosen.steps) for rate in RATES]
    table = Table(title=f"equal in two pushes, {chosen.steps} steps apart")
    for name in lines[0]:
        table.add_column(name, justify="right")
    for line in lines:
        rate, *shares = line.values()
        table.add_row(f"{rate:.0e}", *(f"{share:.1%}" for share in shares))
    console = Console(width=120)
    console.print(table)
    console.print(f"written: {write_json('weight_delta', lines)}")


if __name__ == "__main__":
    main()
