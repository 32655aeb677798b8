"""Shared by the measurements on a GPU: the card's own ceilings, models of random weights, time, waits, the journal."""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.benchmarks.decoder import V

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
}
"""Of Qwen3, by name."""
WAITS = "called a synchronizing CUDA operation"
"""Torch's warning, in its debug mode."""


def options(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a measurement. `doc`: the docstring of its module."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda")
    made.add_argument("--tiny", action="store_true", help="a tiny model, to try the measurement itself")
    made.add_argument("--repetitions", type=int, default=3)
    made.add_argument("--journal", type=Path, default=Path("runs/bench/gpu.jsonl"), help="a file of JSON lines")
    return made


class Journal:
    """Prints each result as it comes and appends it to a file.

    Args:
        part: what is measured.
    """

    def __init__(self, file: Path, part: str, device: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._part = file, part
        self._card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        self._torch = torch.__version__

    def add(self, **figures: Any) -> None:
        """One line. Floats are rounded to four significant digits."""
        figures = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
        line = {"part": self._part, "card": self._card, "torch": self._torch, **figures}
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{self._part}: " + ", ".join(f"{name} {value}" for name, value in figures.items()), flush=True)


def random_model(shape: str, device: str, attention: str = "sdpa") -> Any:
    """A model of random weights in bfloat16, made on the device."""
    config = Qwen3Config(vocab_size=V, max_position_embeddings=8192, **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).eval()


def weight_bytes(model: Any) -> int:
    """Bytes of all weights that a forward reads: not the embedding, of which it looks up a few rows."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    return total - (0 if embedding is model.lm_head.weight else embedding.numel() * embedding.element_size())


def wait(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of a call, with the device's work."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def bytes_per_second(device: str, tiny: bool) -> float:
    """Of a copy within the device's memory, bytes read and written."""
    source = torch.empty((1 << 22) if tiny else (1 << 30), dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.numel() / seconds


def flops_per_second(device: str, tiny: bool) -> float:
    """Of a product of two square matrices of random bfloat16 numbers."""
    size = 256 if tiny else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    a @ b
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def busy_seconds(run: Callable[[], Any], device: str) -> float | None:
    """Seconds during which the GPU computes in a call, as torch's profiler sees its kernels; None on the CPU."""
    if device != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        wait(device)
    return sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6


@contextmanager
def counted_waits(device: str) -> Iterator[list[Any]]:
    """Collects torch's warnings of calls that wait for the GPU; on the CPU there are none."""
    if device != "cuda":
        yield []
        return
    found: list[Any] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
            found += [warning for warning in caught if WAITS in str(warning.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
