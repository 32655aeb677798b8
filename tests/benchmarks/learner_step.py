"""Forward and backward of one training row: our module against the direct formulation, in one process.

    make bench        # or: python -m tests.benchmarks.learner_step [--repetitions 5] [--chunk 64] [--threads 2]

The direct formulation is the simplest one: logits of student and teacher at all P + 2R positions, a float32 log-softmax
of both over the vocabulary, and a dense float mask. Both arms have the same model and row and get the teacher's hidden
states. Then our peak memory alone is measured, with R up to 4,000: it must not grow with R x V.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.grid import BlockGrid
from opdlm.common.masks import training_mask
from opdlm.common.model.load import hidden_states
from opdlm.common.types import HiddenTargets, ScoredTrajectory, Trajectory
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import MicroBatch, collate
from opdlm.learner.rows import build_rows
from opdlm.learner.targets import PositionTargets, gather_targets
from tests.benchmarks.measure import OUT, Ratio, Usage, back_to_back, parser, usage, write_json

V, P, S, LAYERS = 151_936, 128, 4, 4
SHAPES = [(256, 256), (256, 1024), (512, 256), (512, 1024)]
LONG = [256, 512, 1024, 2048, 4000]
GRID, OBJECTIVE = BlockGrid(S, "absolute"), ObjectiveConfig(exclude_eos=False)


def model(hidden: int) -> Qwen3ForCausalLM:
    """A model with random weights in the shape of a small Qwen3 with the whole vocabulary."""
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).train()


def row(hidden: int, response: int, head: torch.Tensor) -> tuple[MicroBatch, PositionTargets]:
    """A row with one state of every block of a response, and targets from random hidden states of a teacher."""
    rng = np.random.default_rng(1)
    steps = np.concatenate([b * S + 1 + rng.permutation(S) for b in range(response // S)]).astype(np.int32)
    trajectory = Trajectory(
        index=0,
        prompt_id="0",
        prompt_ids=rng.integers(0, V - 1, P).astype(np.int32),
        response_ids=rng.integers(0, V - 1, response).astype(np.int32),
        reveal_step=steps,
        response_length=response,
        weight_version=0,
        finish_reason="length",
        denoising_steps=response,
    )
    scored = ScoredTrajectory(trajectory, HiddenTargets(rng.standard_normal((response, hidden), dtype=np.float32)))
    rows = build_rows(scored, GRID, OBJECTIVE, V - 1, rng)
    return collate(rows), gather_targets(rows, head, OBJECTIVE)


def direct(student: Qwen3ForCausalLM, batch: MicroBatch, targets: PositionTargets) -> torch.Tensor:
    """The mean forward KL by the direct formulation."""
    visible = training_mask(batch.samples, batch.copies, batch.blocks)
    here = {"dtype": student.dtype, "device": student.device}
    mask = torch.zeros(visible.shape, **here).masked_fill(~visible, torch.finfo(student.dtype).min)
    logits = student.lm_head(hidden_states(student, batch.input_ids, batch.position_ids, mask))
    log_q = logits.float().log_softmax(-1)
    with torch.no_grad():
        values = torch.zeros(*batch.input_ids.shape, targets.values.shape[1], **here)
        values[batch.loss_line, batch.loss_column] = targets.values.to(student.dtype)
        assert targets.head is not None
        log_p = (values @ targets.head.T).float().log_softmax(-1)
    everywhere = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return everywhere[batch.loss_line, batch.loss_column].mean()


def ours(student: Qwen3ForCausalLM, batch: MicroBatch, targets: PositionTargets, chunk: int) -> torch.Tensor:
    """The mean forward KL by the module that the learner trains."""
    n = len(batch.loss_row)
    return DistillModule(student, OBJECTIVE, chunk)(batch, targets, torch.full((n,), 1 / n))[0]


def measured(student: Qwen3ForCausalLM, loss: Callable[[], torch.Tensor]) -> Usage:
    """Measures one forward and backward. The gradients are allocated in it, so their memory counts."""
    student.zero_grad(set_to_none=True)
    with usage() as used:
        loss().backward()
    return used


def difference(student: Qwen3ForCausalLM, losses: dict[str, Callable[[], torch.Tensor]]) -> tuple[float, float]:
    """(relative difference of the two losses, norm of the gradients' difference relative to their norm)."""
    values, gradients = [], []
    for loss in losses.values():
        student.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        values.append(float(value.detach()))
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    apart = torch.stack([(a - b).norm() for a, b in zip(*gradients, strict=True)]).norm()
    whole = torch.stack([a.norm() for a in gradients[0]]).norm()
    return abs(values[1] / values[0] - 1), float(apart / whole)


def compare(hidden: int, response: int, chunk: int, repetitions: int) -> dict:
    """Measures both arms in one shape; returns a line of the table."""
    student, head = model(hidden), torch.randn(V, hidden) / hidden**0.5
    batch, targets = row(hidden, response, head)
    losses = {
        "direct": lambda: direct(student, batch, targets),
        "ours": lambda: ours(student, batch, targets, chunk),
    }
    off_loss, off_gradient = difference(student, losses)
    arms = {name: lambda loss=loss: measured(student, loss) for name, loss in losses.items()}
    results = back_to_back(arms, repetitions)
    gradients = sum(p.numel() for p in student.parameters()) * 4
    pairs = list(zip(results["direct"], results["ours"], strict=True))
    return {
        "hidden": hidden,
        "response": response,
        "seconds": {name: [u.seconds for u in used] for name, used in results.items()},
        "peak_bytes": {name: [u.peak_bytes for u in used] for name, used in results.items()},
        "gradient_bytes": gradients,
        "times_faster": [d.seconds / o.seconds for d, o in pairs],
        "times_less_memory": [d.peak_bytes / o.peak_bytes for d, o in pairs],
        "times_less_beside_gradients": [
            (d.peak_bytes - gradients) / max(o.peak_bytes - gradients, 1) for d, o in pairs
        ],
        "loss_difference": off_loss,
        "gradient_difference": off_gradient,
    }


def long_rows(hidden: int, chunk: int) -> list[dict]:
    """Measures our peak memory for each R."""
    student, head = model(hidden), torch.randn(V, hidden) / hidden**0.5
    found = []
    for response in LONG:
        batch, targets = row(hidden, response, head)
        used = measured(student, lambda batch=batch, targets=targets: ours(student, batch, targets, chunk))
        found.append({"response": response, "peak_bytes": used.peak_bytes, "logits_bytes": response * V * 4})
    return found


def plot(lines: list[dict], hidden: int) -> None:
    """Writes `runs/bench/learner_step.png`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lengths = [line["response"] for line in lines]
    axes.plot(lengths, [line["peak_bytes"] / 2**30 for line in lines], "o-", label="our whole peak")
    axes.plot(lengths, [line["logits_bytes"] / 2**30 for line in lines], "--", label="one float32 [R, V] alone")
    axes.set(xlabel="R, response tokens", ylabel="GiB", title=f"forward and backward, V = {V:,}, hidden {hidden}")
    axes.legend()
    figure.savefig(OUT / "learner_step.png", dpi=120)


def main() -> None:
    """Measures, prints a table, writes JSON and a plot."""
    options = parser(__doc__)
    options.add_argument("--chunk", type=int, default=64, help="learner.logits_chunk")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    title = f"V = {V:,}, P = {P}, S = {S}, {LAYERS} layers, one row, float32, chunks of {chosen.chunk}"
    table = Table(title=f"{title}, {chosen.threads} threads, {chosen.repetitions} repetitions")
    for name in ("hidden", "R", "s ours", "times faster", "times less memory", "beside gradients", "gradients differ"):
        table.add_column(name, justify="right")
    lines = []
    for hidden, response in SHAPES:
        line = compare(hidden, response, chosen.chunk, chosen.repetitions)
        lines.append(line)
        faster, less, beside = (
            str(Ratio(line[key])) for key in ("times_faster", "times_less_memory", "times_less_beside_gradients")
        )
        seconds, differ = min(line["seconds"]["ours"]), f"{line['gradient_difference']:.1e}"
        table.add_row(str(hidden), f"{response:,}", f"{seconds:.2f}", faster, less, beside, differ)
    hidden = SHAPES[0][0]
    long = long_rows(hidden, chosen.chunk)
    peaks = Table(title=f"our peak, hidden {hidden}")
    for line in long:
        peaks.add_column(f"R {line['response']:,}", justify="right")
    peaks.add_row(*(f"{line['peak_bytes'] / 2**30:.2f} GiB" for line in long))
    written = write_json("learner_step", {"title": title, "shapes": lines, "long": long})
    plot(long, hidden)
    console = Console(width=140)
    console.print(table, peaks)
    console.print(f"written: {written}, {OUT}/learner_step.png")


if __name__ == "__main__":
    main()
