"""Block decoding on a GPU: a step against reading the weights, tokens per second against `generate`, waits.

    python -m tests.benchmarks.gpu.decoding [--shapes 0.6B 8B] [--batches 1 8 64 256] [--device cpu --tiny]

Random weights in the shapes of Qwen3, bfloat16, at the threshold that gives 3.8 tokens per step. `floor` is the time
that the card's own copy speed needs to read all weights once. `busy` is the share of a step in which the GPU computes:
the rest is the host's. Every arm runs once to warm up, which also records its CUDA graphs (`first_seconds`). Sampled
tokens of random weights are all unlikely, so at temperature 1 the threshold is 0.
"""

from __future__ import annotations

from typing import Any

import torch

from opdlm.actors.rollout.cuda_graphs import CudaGraphs
from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.generation import generate
from tests.benchmarks.decoder import MASK, S, V, requests, threshold_for
from tests.benchmarks.gpu.card import (
    Journal,
    busy_seconds,
    bytes_per_second,
    counted_waits,
    options,
    random_model,
    timed,
    weight_bytes,
)

TOKENS_PER_STEP = 3.8


def measure(
    journal: Journal,
    model: Any,
    what: dict[str, Any],
    floor: float,
    arm: str,
    how: DecodeSettings,
    tokens: int,
    repetitions: int,
) -> float:
    """One arm of our decoder. Returns response tokens per second."""
    batch, device = what["batch"], model.device.type
    asked, stats = requests([tokens] * batch), None
    decoder = BlockDecoder(model, how, MASK, [0], batch, CudaGraphs if arm == "graphs" else None)

    def decode() -> None:
        nonlocal stats
        _, stats = decoder.decode(asked)

    first = timed(decode, device)
    seconds = min(timed(decode, device) for _ in range(repetitions))
    busy = busy_seconds(decode, device)
    decoder.add(asked)
    for _ in range(4):
        decoder.step()
    with counted_waits(device) as waits:
        steps = [decoder.step() for _ in range(4)]
    decoder.clear()
    assert stats is not None
    step = seconds / stats.forwards
    journal.add(
        **what,
        arm=arm,
        temperature=how.temperature,
        tokens_per_step=stats.response_tokens / stats.denoising_steps,
        step_ms=1e3 * step,
        floor_ms=1e3 * floor,
        times_floor=step / floor,
        busy=busy / seconds if busy is not None else None,
        waits_per_step=len(waits) / len(steps),
        tokens_per_second=stats.response_tokens / seconds,
        first_seconds=first,
    )
    return stats.response_tokens / seconds


def main() -> None:
    """Measures; the batches that tell most come first."""
    arguments = options(__doc__)
    arguments.add_argument("--shapes", nargs="+", default=["0.6B", "8B"])
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    arguments.add_argument("--tokens", type=int, default=96, help="of each response")
    chosen = arguments.parse_args()
    shapes, batches, tokens = chosen.shapes, chosen.batches, chosen.tokens
    if chosen.tiny:
        shapes, batches, tokens = ["tiny"], [1, 2], 8
    journal, speed = Journal(chosen.journal, "decoding", chosen.device), bytes_per_second(chosen.device, chosen.tiny)
    journal.add(copy_gigabytes_per_second=speed / 1e9)
    for shape in shapes:
        model = random_model(shape, chosen.device)
        floor = weight_bytes(model) / speed
        threshold = 0.0 if chosen.tiny else threshold_for(model, TOKENS_PER_STEP)
        for batch in batches:
            what = {"shape": shape, "batch": batch}
            greedy = DecodeSettings(block_size=S, threshold=threshold, ignore_eos=True)
            sampled = DecodeSettings(block_size=S, threshold=0.0, ignore_eos=True, temperature=1.0)
            arms = [("graphs", greedy), ("plain", greedy), ("graphs", sampled), ("plain", sampled)]
            ours = max(
                measure(journal, model, what, floor, arm, how, tokens, chosen.repetitions)
                for arm, how in arms
                if chosen.device == "cuda" or arm != "graphs"
            )
            prompts = [asked.prompt_ids for asked in requests([1] * batch)]

            def autoregressive(prompts: list[Any] = prompts, batch: int = batch, model: Any = model) -> None:
                generate(model, prompts, tokens, [V + 1], batch)

            autoregressive()
            theirs = batch * tokens / timed(autoregressive, chosen.device)
            journal.add(**what, arm="generate", tokens_per_second=theirs, best_times_generate=ours / theirs)
        del model
        if chosen.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
