"""The block decoder against two alternatives, with the same weights, prompts and batch, in one process.

    make bench        # or: python -m tests.benchmarks.decoder [--student DIR --teacher DIR] [--threads 2]

(a) transformers' `generate`, which decodes the same weights autoregressively; (b) a plain block decoder
(`plain_decoder.py`: a static batch, and a separate forward to commit each block). First with random weights in the
shape of Qwen3-0.6B, bfloat16, at the threshold that gives 3.8 tokens per step; then with the demo's student, if `make
demo` was run. All arms run in turn in each repetition, and ratios are taken within a repetition, because machines are
noisy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen3Config

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.generation import generate
from opdlm.common.data.tasks import get_task
from opdlm.common.types import RolloutRequest
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.held_out import HeldOutProblems
from tests.benchmarks.measure import OUT, Ratio, back_to_back, parser, write_json
from tests.benchmarks.plain_decoder import plain_decode

V, P, S = 151_936, 64, 4
MASK = V - 1
TOKENS_PER_STEP = 3.8
BATCHES, EQUAL = [1, 2, 8, 32], 48
MIXED, MIXED_BATCH = 24, 8
DEMO_BATCHES, DEMO_LIMIT = (8, 32, 128), 40


@dataclass(frozen=True)
class Measured:
    """What one arm did in one repetition."""

    tokens: int
    steps: int
    seconds: float
    model_seconds: float
    """Seconds of them inside the model: its layers and its output matrix."""

    @property
    def speed(self) -> float:
        """Response tokens per second."""
        return self.tokens / self.seconds


class ModelTimer:
    """Adds up the time that is spent in a model's layers and output matrix."""

    def __init__(self, model: Any) -> None:
        self.seconds = 0.0
        self._started = 0.0
        for part in (model.model, model.lm_head):
            part.register_forward_pre_hook(self._enter)
            part.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started

    def measure(self, run: Callable[[], tuple[int, int]]) -> Measured:
        """Times a function that returns (response tokens, denoising steps)."""
        self.seconds, started = 0.0, time.perf_counter()
        tokens, steps = run()
        return Measured(tokens, steps, time.perf_counter() - started, self.seconds)


def random_model() -> Any:
    """A model with random weights in the shape of Qwen3-0.6B, bfloat16."""
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    assert sum(p.numel() for p in model.parameters()) == 596_049_920  # the number of the public checkpoint
    return model


def requests(limits: list[int]) -> list[RolloutRequest]:
    """Random prompts of P tokens, one for each limit of response tokens."""
    rng = np.random.default_rng(0)
    return [
        RolloutRequest(i, str(i), rng.integers(0, MASK, P).astype(np.int32), n, seed=i) for i, n in enumerate(limits)
    ]


def decode(model: Any, asked: list[RolloutRequest], threshold: float, batch: int) -> tuple[int, int]:
    """Our decoder, which ignores end-of-sequence tokens."""
    how = DecodeSettings(block_size=S, threshold=threshold, ignore_eos=True)
    _, stats = BlockDecoder(model, how, MASK, [0], batch).decode(asked)
    return stats.response_tokens, stats.denoising_steps


def plain(model: Any, asked: list[RolloutRequest], threshold: float, batch: int) -> tuple[int, int]:
    """The plain block decoder, which does not count steps."""
    responses = plain_decode(model, asked, S, threshold, MASK, batch)
    return sum(map(len, responses)), 0


def autoregressive(model: Any, prompts: list[np.ndarray], limit: int, batch: int) -> tuple[int, int]:
    """`generate`. Every response reaches the limit, because the end-of-sequence token is one that no model has."""
    responses = generate(model, prompts, limit, [V + 1], batch)
    tokens = sum(map(len, responses))
    return tokens, tokens


def threshold_for(model: Any, tokens_per_step: float) -> float:
    """The threshold at which a model decodes that many tokens per step, found by bisection."""
    asked, low, high = requests([EQUAL] * MIXED_BATCH), -20.0, 0.0
    for _ in range(8):
        middle = (low + high) / 2
        tokens, steps = decode(model, asked, 2.0**middle, MIXED_BATCH)
        low, high = (middle, high) if tokens / steps > tokens_per_step else (low, middle)
    return 2.0**low


def random_weights(batches: list[int], repetitions: int) -> list[dict]:
    """Responses of equal length in several batch sizes, then responses of mixed lengths."""
    model = random_model()
    timer = ModelTimer(model)
    threshold = threshold_for(model, TOKENS_PER_STEP)
    lines = []
    for batch in batches:
        asked = requests([EQUAL] * batch)
        prompts = [r.prompt_ids for r in asked]
        arms = {
            "generate": lambda p=prompts, b=batch: autoregressive(model, p, EQUAL, b),
            "plain": lambda a=asked, b=batch: plain(model, a, threshold, b),
            "ours": lambda a=asked, b=batch: decode(model, a, threshold, b),
        }
        lines += compare(f"Qwen3-0.6B shape, {EQUAL} tokens each", batch, timer, arms, repetitions)
    limits = np.random.default_rng(2).lognormal(3.0, 0.8, MIXED).clip(4, 160).astype(int).tolist()
    asked = requests(limits)
    arms = {
        "plain": lambda: plain(model, asked, threshold, MIXED_BATCH),
        "ours": lambda: decode(model, asked, threshold, MIXED_BATCH),
    }
    what = f"Qwen3-0.6B shape, {min(limits)} to {max(limits)} tokens, median {int(np.median(limits))}"
    return lines + compare(what, MIXED_BATCH, timer, arms, repetitions)


def demo(student_folder: Path, teacher_folder: Path, repetitions: int) -> list[dict]:
    """The demo's student against its teacher."""
    student, teacher = CheckpointDecoder(student_folder), CheckpointDecoder(teacher_folder)
    asked = HeldOutProblems([get_task("chain")], student.tokenizer, 256).requests(DEMO_LIMIT)
    timer = ModelTimer(student.model)

    def block(strategy: Any, batch: int) -> tuple[int, int]:
        answers = student.answer(asked, replace(student.base.greedy(strategy), threshold=0.9), batch)
        return answers.tokens, answers.denoising_steps

    def causal(batch: int) -> tuple[int, int]:
        tokens = sum(map(len, teacher.continue_prompts(asked, 0.0, batch)))
        return tokens, tokens

    lines = []
    for batch in DEMO_BATCHES:
        arms = {
            "generate": lambda b=batch: causal(b),
            "ours, static": lambda b=batch: block("low_confidence_static", b),
            "ours": lambda b=batch: block("low_confidence_dynamic", b),
        }
        lines += compare("demo", batch, timer, arms, repetitions)
    return lines


def compare(
    what: str, batch: int, timer: ModelTimer, arms: dict[str, Callable[[], tuple[int, int]]], repetitions: int
) -> list[dict]:
    """Runs all arms in turn; returns a line of the table for each.

    `generate` has no share of time outside the model, because its model is not always the timer's.
    """
    runs = back_to_back({name: lambda run=run: timer.measure(run) for name, run in arms.items()}, repetitions)
    return [
        {
            "what": what,
            "batch": batch,
            "arm": name,
            "tokens_per_step": found[0].tokens / found[0].steps if found[0].steps else None,
            "tokens_per_second": [run.speed for run in found],
            "share_outside_model": [1 - run.model_seconds / run.seconds for run in found]
            if name != "generate"
            else None,
            "times": {
                other: [run.speed / base.speed for run, base in zip(found, runs[other], strict=True)]
                for other in ("generate", "plain")
                if other in runs and other != name
            },
        }
        for name, found in runs.items()
    ]


def show(lines: list[dict], title: str) -> Table:
    """The table of all lines."""
    table = Table(title=title)
    table.add_column("what")
    for name in ("batch", "arm", "tokens per step", "tokens/s", "times (a) generate", "times (b) plain", "outside"):
        table.add_column(name, justify="right")
    for line in lines:
        step, outside, times = line["tokens_per_step"], line["share_outside_model"], line["times"]
        table.add_row(
            line["what"],
            str(line["batch"]),
            line["arm"],
            f"{step:.2f}" if step else "",
            f"{Ratio(line['tokens_per_second']).median:,.0f}",
            str(Ratio(times["generate"])) if "generate" in times else "",
            str(Ratio(times["plain"])) if "plain" in times else "",
            f"{Ratio(outside).median:.0%}" if outside else "",
        )
    return table


def plot(lines: list[dict]) -> None:
    """Writes `runs/bench/decoder.png`: the speed as a multiple of `generate`'s, by batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for what in dict.fromkeys(line["what"] for line in lines):
        ours = [x for x in lines if x["what"] == what and x["arm"] == "ours" and "generate" in x["times"]]
        ratios = [Ratio(line["times"]["generate"]) for line in ours]
        if ratios:
            spread = [[r.median - min(r.values) for r in ratios], [max(r.values) - r.median for r in ratios]]
            axes.errorbar([x["batch"] for x in ours], [r.median for r in ratios], spread, marker="o", label=what)
    axes.axhline(1.0, color="grey", linestyle="--")
    axes.set(xlabel="batch", ylabel="tokens per second, times `generate`", xscale="log", title="block decoding, S = 4")
    axes.legend()
    figure.savefig(OUT / "decoder.png", dpi=120)


def main() -> None:
    """Measures, prints a table, writes JSON and a plot."""
    options = parser(__doc__)
    options.add_argument("--student", type=Path, default=Path("runs/demo/student"))
    options.add_argument("--teacher", type=Path, default=Path("models/chain-teacher"))
    options.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="batch sizes for the random weights")
    options.add_argument("--only", choices=["random", "demo"], help="measure with one of the two models")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    console, lines = Console(width=150), []
    if chosen.only != "demo":
        lines += random_weights(chosen.batches, chosen.repetitions)
    if chosen.only != "random":
        if chosen.student.is_dir() and chosen.teacher.is_dir():
            lines += demo(chosen.student, chosen.teacher, chosen.repetitions)
        else:
            console.print(f"left out: {chosen.student} or {chosen.teacher} does not exist; `make demo` makes both")
    title = f"P = {P}, S = {S}, {chosen.threads} threads, {chosen.repetitions} repetitions, median (range)"
    console.print(show(lines, title))
    written = write_json("decoder", {"title": title, "lines": lines})
    plot(lines)
    console.print(f"written: {written}, {OUT}/decoder.png")


if __name__ == "__main__":
    main()
