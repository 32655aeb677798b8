"""Rounds of sequences whose lengths nobody knows before they end, and the arm of an older commit that decodes them.

`streaming.py` imports this module, and runs it as a script in a copy of an older commit: that commit decodes call after
call with its own code. The script reads a JSON object from stdin and writes one to stdout.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

P, S, END = 32, 4, 0
"""Prompt tokens, block size, and the end token."""


def lognormal(count: int, limit: int, seed: int) -> list[int]:
    """Lengths with a long tail: median an eighth of the limit, sigma 1, cut at the limit."""
    drawn = np.random.default_rng(seed).lognormal(np.log(limit / 8), 1.0, count)
    return [int(length) for length in np.clip(np.ceil(drawn), 1, limit)]


def random_model(width: int, layers: int, vocabulary: int, positions: int) -> Any:
    """Random weights, with Qwen3's architecture; with width 1024 and 28 layers in the shape of Qwen3-0.6B."""
    heads = max(width // 64, 1)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=2 * heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    dtype, device = (torch.bfloat16, "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)


def requests(make: Any, lengths: list[int], limit: int, first: int = 0) -> list[Any]:
    """A request for each length; its seed is its index, by which `force_ends` knows it. `make`: `RolloutRequest`."""
    rng = np.random.default_rng(first)
    ids = rng.integers(1, 100, (len(lengths), P)).astype(np.int32)
    return [make(first + i, str(first + i), ids[i], limit, seed=first + i) for i in range(len(lengths))]


def force_ends(drawer: type, lengths: list[int]) -> None:
    """Makes a sequence draw the end token where it has its length. `drawer`: the class that draws candidates."""
    draw, ends = drawer._candidates, torch.tensor(lengths)  # type: ignore[attr-defined]

    def forced(self: Any, slots: Any, window: torch.Tensor, places: torch.Tensor, logits: torch.Tensor) -> Any:
        candidates, *others = draw(self, slots, window, places, logits)
        last = (slots.prompt_length + ends.to(window.device)[slots.seed] - 1)[:, None]
        at_end = (window >= last).flatten()[places]
        return torch.where(at_end, END, candidates.clamp(min=1)), *others

    drawer._candidates = forced  # type: ignore[attr-defined]


def main() -> None:
    """Decodes calls one after the other, with the `actors.block_decoder` of the working directory."""
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    decoders, types = (importlib.import_module(name) for name in ("actors.block_decoder", "common.types"))
    how = importlib.import_module("actors.decode_settings").DecodeSettings(
        block_size=S, strategy="low_confidence_static"
    )
    lengths, calls = [n for call in task["calls"] for n in call], task["calls"]
    model = random_model(**task["model"])
    force_ends(decoders.BlockDecoder, lengths)
    decoder = decoders.BlockDecoder(model, how, task["model"]["vocabulary"] - 1, [END], task["slots"])
    decoder.decode(requests(types.RolloutRequest, [1] * 4, 8))  # warms up
    started, first, tokens, forwards = time.perf_counter(), 0, 0, 0
    for call in calls:
        _, stats = decoder.decode(requests(types.RolloutRequest, call, task["limit"], first))
        first, tokens, forwards = first + len(call), tokens + stats.response_tokens, forwards + stats.forwards
    print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens, "forwards": forwards}))


if __name__ == "__main__":
    main()
