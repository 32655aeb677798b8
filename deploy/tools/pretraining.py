"""Training a small AR teacher from scratch: a Qwen3 of any size, plain next-token cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opdlm.common.data.tasks import Task, problems
from opdlm.common.errors import OpdlmError

IGNORED = -100  # cross_entropy's label for "no loss here"


@dataclass(frozen=True, slots=True)
class PretrainSettings:
    """Size of the model and length of the training; the defaults are the demo's."""

    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    context: int = 128
    """Longest sequence in tokens."""
    steps: int = 600
    batch_size: int = 64
    """Sequences a step."""
    lr: float = 3e-3
    """Peak learning rate; 5 % warm-up, then cosine to a tenth."""
    seed: int = 0


def build_model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights, float32."""
    torch.manual_seed(settings.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=max(settings.heads // 2, 1),
        head_dim=settings.hidden_size // settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def pretrain(
    model: Qwen3ForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    settings: PretrainSettings,
    progress: Callable[[int, float], None],
) -> None:
    """Trains in place. `batches` gives (ids, labels) `[B, T]` int64; `progress` is told (step, loss)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(settings.steps // 20, 1)
    model.train()
    for step in range(settings.steps):
        scale = min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * scale
        ids, labels = next(batches)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, loss.item())
    model.eval()


def task_batches(
    task: Task, tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of training problems; the loss is on the solution and its end token."""
    source = problems(task, "train", settings.seed)
    while True:
        rows, labels = [], []
        for problem in (next(source) for _ in range(settings.batch_size)):
            prompt = tokenizer(problem.prompt)["input_ids"]
            solution = [*tokenizer(problem.solution)["input_ids"], tokenizer.eos_token_id]
            rows.append(prompt + solution)
            labels.append([IGNORED] * len(prompt) + solution)
        longest = max(len(row) for row in rows)
        yield _padded(rows, longest, tokenizer.pad_token_id), _padded(labels, longest, IGNORED)


def text_batches(
    file: Path, tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of random windows of a text file; the loss is on every token."""
    ids = np.array(tokenizer(file.read_text())["input_ids"], dtype=np.int64)
    length = settings.context
    if len(ids) <= length:
        raise OpdlmError(f"pretrain: {file} has {len(ids)} characters; more than --context {length} are needed")
    rng = np.random.default_rng(settings.seed)
    while True:
        starts = rng.integers(0, len(ids) - length, size=settings.batch_size)
        window = torch.from_numpy(np.stack([ids[s : s + length] for s in starts]))
        yield window, window


def _padded(rows: list[list[int]], length: int, fill: int) -> torch.Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])
