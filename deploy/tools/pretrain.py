"""`opdlm pretrain`: trains a small AR teacher from scratch, a Qwen3 of any size, with next-token cross-entropy."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opdlm.actors.teacher.generation import generate
from opdlm.common.config.schema import DataConfig
from opdlm.common.data.reranking import ANSWER_MARK
from opdlm.common.data.rows import read_rows
from opdlm.common.data.tasks import Task, get_task, problems
from opdlm.common.errors import OpdlmError
from opdlm.common.files import check_new_folder, read_text
from opdlm.common.model.char_tokenizer import build_char_tokenizer
from opdlm.common.model.folder import save_model
from opdlm.common.text import text_fault
from opdlm.deploy.evaluate.held_out import HeldOutProblems
from opdlm.deploy.observe.meter import PLAIN_SECONDS

_HELD_OUT_PROBLEMS = 500
_IGNORED = -100
"""The label of positions without loss."""

Batches = Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Endless (ids, labels, weights), each `[B, T]`: int64, int64, float32."""


@dataclass(frozen=True, slots=True)
class PretrainSettings:
    """Size of the model and length of the training; the defaults are the demo's."""

    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    context: int = 128
    """Longest sequence in tokens."""
    steps: int = 900
    batch_size: int = 64
    """Sequences per step."""
    lr: float = 3e-3
    """Peak learning rate: 5 % of the steps are warm-up, then it falls as a cosine to a tenth."""
    seed: int = 0
    answer_weight: float = 1.0
    """How much a token behind the reasoning's end (`#` in `rerank`) counts, where another one counts 1."""


def run_pretrain(
    destination: Path,
    task_name: str | None,
    text: Path | None,
    data: Path | None,
    settings: PretrainSettings,
    console: Console,
) -> None:
    """Trains on a task, a text file or prompts with responses, and saves a checkpoint folder in Hugging Face layout.

    The folder is written whole or not at all.

    Prints the exact match on held-out problems where a task is given.

    Raises:
        OpdlmError: options that do not fit together, a destination that exists, or an unusable text file.
    """
    if [task_name, text, data].count(None) != 2:
        raise OpdlmError("pretrain: give exactly one of --task (e.g. chain), --text FILE and --data FILE")
    check_new_folder("pretrain", destination)
    if settings.hidden_size % settings.heads:
        raise OpdlmError(
            f"pretrain: --hidden-size {settings.hidden_size} is not a multiple of --heads {settings.heads}"
        )
    task = get_task(task_name) if task_name else None
    content = "" if text is None else _read(text)
    pairs = [] if data is None else _read_pairs(data, settings.context)
    alphabet = task.alphabet if task else content or "".join(sorted({c for pair in pairs for c in "".join(pair)}))
    tokenizer = build_char_tokenizer(alphabet)
    tokenizer.model_max_length = settings.context
    model = build_model(settings, tokenizer)
    if task is not None:
        batches = task_batches(task, tokenizer, settings)
    elif data is not None:
        batches = pair_batches(_again_and_again(pairs, settings.seed), tokenizer, settings)
    else:
        batches = text_batches(content, str(text), tokenizer, settings)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"training {parameters:,} parameters, vocabulary {len(tokenizer)}, {settings.steps} steps", highlight=False
    )
    _train_with_progress(model, batches, settings, console)
    if task is not None:
        held_out = HeldOutProblems([task], tokenizer, _HELD_OUT_PROBLEMS)
        responses = generate(model, held_out.prompt_ids, settings.context // 2, [tokenizer.eos_token_id], 128)
        console.print(
            f"exact match on {_HELD_OUT_PROBLEMS} held-out problems: {held_out.exact_match(responses):.1%}",
            highlight=False,
        )
    save_model(model, tokenizer, destination, [tokenizer.eos_token_id])
    console.print(f"written: {destination}", highlight=False)


def _train_with_progress(
    model: Qwen3ForCausalLM, batches: Batches, settings: PretrainSettings, console: Console
) -> None:
    """Shows a progress bar; where the console is no terminal, ten lines instead, or more if steps are slow."""
    every, last = max(settings.steps // 10, 1), time.monotonic()
    with Progress(
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        row = bar.add_task("", total=settings.steps, loss=float("nan"))

        def progress(step: int, loss: float) -> None:
            nonlocal last
            bar.update(row, completed=step, loss=loss)
            if not console.is_terminal and (step % every == 0 or time.monotonic() - last >= PLAIN_SECONDS):
                last = time.monotonic()
                console.print(f"step {step}/{settings.steps} loss {loss:.4f}", highlight=False)

        pretrain(model, batches, settings, progress)


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
    batches: Batches,
    settings: PretrainSettings,
    progress: Callable[[int, float], None],
) -> None:
    """Trains in place. After each step, `progress` is called with the number of steps done and the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(settings.steps // 20, 1)
    model.train()
    for step in range(settings.steps):
        scale = min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * scale
        ids, labels, weights = next(batches)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=_IGNORED, reduction="none"
        )
        counted = weights[:, 1:].flatten()
        loss = (each * counted).sum() / counted.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, loss.item())
    model.eval()


def task_batches(task: Task, tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings) -> Batches:
    """Training problems of a task."""
    training = problems(task, "train", settings.seed)
    return pair_batches(((problem.prompt, problem.solution) for problem in training), tokenizer, settings)


def pair_batches(
    pairs: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings
) -> Batches:
    """Prompts with their responses; the loss is on the response and its end-of-sequence token."""
    mark = tokenizer.get_vocab().get(ANSWER_MARK)
    while True:
        chosen = [next(pairs) for _ in range(settings.batch_size)]
        prompts = tokenizer([prompt for prompt, _ in chosen])["input_ids"]  # in one call: it costs 3 times less
        solutions = tokenizer([response for _, response in chosen])["input_ids"]
        rows, labels, weights = [], [], []
        for prompt, solution in zip(prompts, solutions, strict=True):
            rows.append([*prompt, *solution, tokenizer.eos_token_id])
            labels.append([*([_IGNORED] * len(prompt)), *solution, tokenizer.eos_token_id])
            reasoning = solution.index(mark) + 1 if mark in solution else len(solution) + 1
            answer = [settings.answer_weight] * (len(solution) + 1 - reasoning)
            weights.append([*([0.0] * len(prompt)), *([1.0] * reasoning), *answer])
        longest = max(len(row) for row in rows)
        ids = _padded(rows, longest, tokenizer.pad_token_id), _padded(labels, longest, _IGNORED)
        yield *ids, _padded(weights, longest, 0.0)


def _read_pairs(file: Path, context: int) -> list[tuple[str, str]]:
    """The rows of a data file, each a prompt and a response as text.

    Raises:
        OpdlmError: the file cannot be read, or a row is longer than the context; the row is named.
    """
    pairs = []
    for row in read_rows(DataConfig(path=str(file), response_field="response"), 0):
        if not isinstance(row.prompt, str) or not isinstance(row.response, str):
            raise OpdlmError(f"pretrain: --data {row.name}: found token ids or chat messages; expected text")
        if (length := len(row.prompt) + len(row.response) + 1) > context:
            raise OpdlmError(f"pretrain: --data {row.name} has {length} tokens, more than --context {context}")
        pairs.append((row.prompt, row.response))
    if not pairs:
        raise OpdlmError(f"pretrain: --data {file} has no rows")
    return pairs


def _again_and_again(pairs: list[tuple[str, str]], seed: int) -> Iterator[tuple[str, str]]:
    """All pairs in random order, for ever, each time in another order."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(pairs, len(pairs))


def _read(file: Path) -> str:
    if not file.is_file():
        raise OpdlmError(f"pretrain: --text {file} {'is no file' if file.exists() else 'does not exist'}")
    content = read_text(file)
    if fault := text_fault(content):
        raise OpdlmError(f"pretrain: --text {file} holds {fault}; give a text file")
    return content


def text_batches(text: str, name: str, tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings) -> Batches:
    """Random windows of a text, which errors call `name`; the loss is on every token.

    Raises:
        OpdlmError: the text is not longer than one window.
    """
    ids = np.array(tokenizer(text)["input_ids"], dtype=np.int64)
    length = settings.context
    if len(ids) <= length:
        raise OpdlmError(f"pretrain: {name} has {len(ids)} characters; more than --context {length} are needed")
    rng = np.random.default_rng(settings.seed)
    while True:
        starts = rng.integers(0, len(ids) - length, size=settings.batch_size)
        windows = torch.from_numpy(np.stack([ids[s : s + length] for s in starts]))
        yield windows, windows, torch.ones(windows.shape)


def _padded(rows: list[list[Any]], length: int, fill: float) -> torch.Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])
