"""`opdlm generate`: decodes prompts and prints the text; with `--trace`, also each denoising step of each block."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from opdlm.actors.rollout.observation import StepObservation
from opdlm.deploy.evaluate.generation import Model

MASK_SIGN = "░"
"""Stands for a masked token."""
_EMPTY = "(empty response: it ended at once, or holds no text)"
_NO_BLOCK = (-1, -1)
"""(index, position) before the first block."""
_HEAD = "step  block; red 0 % to green 100 %: confidence of what the step revealed"
_HEAD_OF_DRAFTS = "step  red 0 % to green 100 %: what it verified, and the teacher's probability; grey: drafts"


def run_generate(
    folder: Path, prompts: list[str], block_size: int | None, trace: bool, console: Console, **how: Any
) -> None:
    """Decodes the prompts with the model in `folder`, and prints the text and the speed. `how`: see `Model.generate`.

    Raises:
        OpdlmError: a prompt does not fit, or an option does not go with the model.
    """
    model = Model(folder, block_size)
    # With a trace, prompts are decoded one after the other, so that the lines of two sequences do not mix.
    observing: dict[str, Any] = {"observer": Tracer(model, console), "batch_size": 1} if trace else {}
    started = time.perf_counter()
    generations = model.generate(prompts, **how, **observing)
    seconds = time.perf_counter() - started
    if (line := model.unknown_characters(prompts)) is not None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for generation in generations:
        text = (f" {_EMPTY}", "dim italic") if generation.is_empty else generation.text
        console.print(Text.assemble((generation.prompt, "bold"), text), soft_wrap=True)
    if empty := sum(generation.is_empty for generation in generations):
        print(f"opdlm: warning: {empty} of {len(generations)} responses are empty", file=sys.stderr)
    tokens = sum(len(generation.ids) for generation in generations)
    per_step = tokens / sum(generation.denoising_steps for generation in generations)
    console.print(
        f"{tokens} tokens, {per_step:.2f} per denoising step, {tokens / seconds:.0f} per second",
        style="dim",
        highlight=False,
    )


class Tracer:
    """Prints one line per denoising step: the block, the tokens that this step revealed, and their confidence."""

    def __init__(self, model: Model, console: Console) -> None:
        self._model = model
        self._console = console
        self._block = _NO_BLOCK

    def __call__(self, observed: StepObservation) -> None:
        """Prints one step of the only live sequence."""
        if self._block == _NO_BLOCK:
            self._console.print(_HEAD if observed.drafts is None else _HEAD_OF_DRAFTS, style="dim")
        start = int(observed.positions[0, 0])
        if observed.drafts is None and (observed.index[0], start) != self._block:
            self._console.print(f"      positions {start} to {int(observed.positions[0, -1])}", style="dim")
        self._block = (observed.index[0], start)
        line = Text(f"{observed.step[0]:4d}  ")
        for column in range(observed.tokens.shape[1]):
            if bool(observed.revealed[0, column]):
                confidence = float(observed.confidence[0, column])
                line.append(self._text(int(observed.candidates[0, column])), style=f"bold {_colour(confidence)}")
                line.append(f" {confidence:.0%} ", style=_colour(confidence))
            elif bool(observed.masked[0, column]):
                is_draft = observed.drafts is not None
                line.append(f"{self._text(int(observed.candidates[0, column])) if is_draft else MASK_SIGN} ", "dim")
            else:
                line.append(f"{self._text(int(observed.tokens[0, column]))} ")
        self._console.print(line, soft_wrap=True)

    def _text(self, token: int) -> str:
        return self._model.tokenizer.decode([token]).replace("\n", "⏎") or "∅"


def _colour(confidence: float) -> str:
    return f"rgb({round(220 * (1 - confidence))},{round(60 + 140 * confidence)},60)"
