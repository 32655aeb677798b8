"""Peak memory of a forward and backward of the learner at a fixed number of tokens, over the length of responses.

    make bench        # or: python -m tests.benchmarks.learner_memory [--tokens 16384] [--lengths 256 1024 4000 8000]

A rank's rows, of responses of R tokens each, are cut into micro-batches of `--tokens` by the learner's own code. One
full micro-batch goes through the module that it trains, with random weights. The goal: over R the peak stays within
25 %, as long as `--tokens` is at least the longest row. `--rows 8` measures micro-batches of a fixed number of rows
instead, as they were before. With `--width 1024` a layer has the shape of one of Qwen3-0.6B; that takes four times as
long.

`--device cuda` measures what torch allocates on the GPU, with flex_attention, as a learner on a GPU has it.
"""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.grid import BlockGrid
from opdlm.common.types import HiddenTargets, ScoredTrajectory, Trajectory
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import MicroBatch, micro_batches, pack
from opdlm.learner.rows import Row, build_rows
from opdlm.learner.targets import gather_targets
from tests.benchmarks.measure import parser, usage, write_json

P, S = 128, 4
OBJECTIVE = ObjectiveConfig(exclude_eos=False)


def model(layers: int, width: int, vocabulary: int, attention: str) -> Qwen3ForCausalLM:
    """Random weights, in the proportions of Qwen3-0.6B."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.bfloat16).train()


def rows(count: int, response: int, width: int, vocabulary: int) -> list[Row]:
    """One row of each of `count` trajectories of random tokens."""
    rng, made = np.random.default_rng(1), []
    for index in range(count):
        trajectory = Trajectory(
            index=index,
            prompt_id=str(index),
            prompt_ids=rng.integers(0, vocabulary - 1, P).astype(np.int32),
            response_ids=rng.integers(0, vocabulary - 1, response).astype(np.int32),
            reveal_step=np.concatenate([b * S + 1 + rng.permutation(S) for b in range(response // S)]).astype(np.int32),
            response_length=response,
            weight_version=0,
            finish_reason="length",
            denoising_steps=response,
        )
        targets = HiddenTargets(rng.standard_normal((response, width), dtype=np.float32))
        made += build_rows(ScoredTrajectory(trajectory, targets), BlockGrid(S), OBJECTIVE, vocabulary - 1, rng)
    return made


def peak(student: Qwen3ForCausalLM, batch: MicroBatch, head: torch.Tensor, attention: str) -> tuple[int, float]:
    """(bytes, seconds) of a forward and backward. The gradients are allocated in it, so their memory counts."""
    device = head.device
    module = DistillModule(student, OBJECTIVE, 256, attention).to(device)
    weights = torch.full((len(batch.loss_row),), 1 / len(batch.loss_row), device=device)
    student.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with usage() as used:
        targets = gather_targets(batch.rows, head, OBJECTIVE).to(device)
        module(batch.to(device), targets, weights)[0].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
    bytes_ = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else used.peak_bytes
    return bytes_, used.seconds


def main() -> None:
    """Measures, prints a table, writes JSON."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=16384, help="learner.micro_batch_tokens")
    options.add_argument("--rows", type=int, help="micro-batches of so many rows instead")
    options.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4000, 8000], help="R")
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--vocabulary", type=int, default=151_936)
    options.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    options.add_argument("--device", default="cpu")
    options.set_defaults(repetitions=1)  # memory hardly varies
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    attention = "flex_attention" if chosen.device == "cuda" else "sdpa"
    student = model(chosen.layers, chosen.width, chosen.vocabulary, attention).to(chosen.device)
    if chosen.checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    head = torch.randn(chosen.vocabulary, chosen.width, dtype=torch.bfloat16, device=chosen.device)
    bound = f"{chosen.rows} rows" if chosen.rows else f"{chosen.tokens:,} tokens"
    title = f"a micro-batch of {bound}; {chosen.layers} layers of width {chosen.width}, V = {chosen.vocabulary:,}, bf16"
    table = Table(title=f"{title}, {chosen.device}")
    for name in ("R", "rows", "tokens", "peak, GiB", "of the least", "s"):
        table.add_column(name, justify="right")
    lines = []
    for response in chosen.lengths:
        count = chosen.rows or max(chosen.tokens // (P + 2 * response), 1)
        made = rows(count, response, chosen.width, chosen.vocabulary)
        batch = pack(made) if chosen.rows else micro_batches(made, chosen.tokens)[0]
        measured = [peak(student, batch, head, attention) for _ in range(chosen.repetitions)]
        lines.append(
            {
                "response": response,
                "rows": len(batch.rows),
                "tokens": batch.input_ids.numel(),
                "peak_bytes": min(nbytes for nbytes, _ in measured),
                "seconds": min(seconds for _, seconds in measured),
            }
        )
    least = min(line["peak_bytes"] for line in lines)
    for line in lines:
        share, gib = line["peak_bytes"] / least, line["peak_bytes"] / 2**30
        figures = (f"{gib:.2f}", f"{share:.2f}", f"{line['seconds']:.1f}")
        table.add_row(f"{line['response']:,}", str(line["rows"]), f"{line['tokens']:,}", *figures)
    written = write_json("learner_memory", {"title": title, "device": chosen.device, "lines": lines})
    console = Console(width=140)
    console.print(table)
    console.print(f"the largest peak is {max(line['peak_bytes'] for line in lines) / least:.2f} times the least")
    console.print(f"written: {written}")


if __name__ == "__main__":
    main()
