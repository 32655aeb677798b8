"""`opdlm generate`: the text, and with `--trace` each block as it is unmasked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from opdlm.actors.rollout.observation import StepObservation
from opdlm.common.config.schema import Strategy
from opdlm.common.data.chat import chat_prompt
from opdlm.common.errors import OpdlmError
from opdlm.common.types import RolloutRequest
from opdlm.deploy.evaluate.decoders import CheckpointDecoder

_MASK_SIGN = "░"


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """As on the command line."""

    max_new_tokens: int
    strategy: Strategy
    threshold: float
    block_size: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: int
    trace: bool
    chat: bool = False
    thinking: bool | None = None


def run_generate(folder: Path, prompts: list[str], options: GenerateOptions, console: Console) -> None:
    """Decodes and prints."""
    checkpoint = CheckpointDecoder(folder, options.block_size)
    if options.thinking is not None and not options.chat:
        raise OpdlmError("--thinking: found without --chat; it is the chat template's")
    encoded = [
        checkpoint.encode(chat_prompt(checkpoint.tokenizer, prompt, options.thinking) if options.chat else prompt)
        for prompt in prompts
    ]
    room = checkpoint.facts.context - options.max_new_tokens - checkpoint.base.block_size
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not 0 < len(ids) <= room:
            raise OpdlmError(
                f"--prompt {prompt[:30]!r}: {len(ids)} tokens; expected 1 to {room} (context "
                f"{checkpoint.facts.context}, --max-new-tokens {options.max_new_tokens})"
            )
    if not checkpoint.is_student:
        if options.trace:
            raise OpdlmError(
                f"--trace: {folder} is autoregressive; there are no blocks to show (opdlm convert makes a student)"
            )
        if (options.top_k, options.top_p) != (0, 1.0):
            raise OpdlmError(f"--top-k, --top-p: {folder} is autoregressive; it samples from the whole vocabulary")
        answers = checkpoint.generate(encoded, options.max_new_tokens, len(encoded), options.temperature, options.seed)
    else:
        settings = replace(
            checkpoint.base,
            strategy=options.strategy,
            threshold=options.threshold,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
        requests = [
            RolloutRequest(i, f"--prompt {i}", ids, options.max_new_tokens, seed=options.seed + i)
            for i, ids in enumerate(encoded)
        ]
        tracer = Tracer(checkpoint, console) if options.trace else None
        # One by one when traced, so that the picture is of one sequence at a time.
        answers = checkpoint.decode(requests, settings, 1 if tracer else len(requests), tracer)
    for prompt, ids in zip(prompts, answers.responses, strict=True):
        text = checkpoint.tokenizer.decode(ids, skip_special_tokens=True)
        console.print(Text.assemble((prompt, "bold"), text), soft_wrap=True)
    tokens = sum(len(ids) for ids in answers.responses)
    console.print(
        f"{tokens} tokens, {answers.tokens_per_step:.2f} per denoising step, {tokens / answers.seconds:.0f} per second",
        style="dim",
        highlight=False,
    )


class Tracer:
    """Prints one line a denoising step: the block, what this step revealed, and how sure the model was."""

    def __init__(self, checkpoint: CheckpointDecoder, console: Console) -> None:
        self._checkpoint = checkpoint
        self._console = console
        self._block = (-1, -1)
        console.print("step  block; red 0 % to green 100 % confidence of what the step revealed", style="dim")

    def __call__(self, view: StepObservation) -> None:
        """Shows one step of the one live sequence."""
        start = int(view.positions[0, 0])
        if (view.index[0], start) != self._block:
            self._block = (view.index[0], start)
            self._console.print(f"      positions {start} to {int(view.positions[0, -1])}", style="dim")
        line = Text(f"{view.step[0]:4d}  ")
        for column in range(view.tokens.shape[1]):
            if bool(view.revealed[0, column]):
                confidence = float(view.confidence[0, column])
                line.append(self._text(int(view.candidates[0, column])), style=f"bold {_colour(confidence)}")
                line.append(f" {confidence:.0%} ", style=_colour(confidence))
            elif bool(view.masked[0, column]):
                line.append(f"{_MASK_SIGN} ", style="dim")
            else:
                line.append(f"{self._text(int(view.tokens[0, column]))} ")
        self._console.print(line, soft_wrap=True)

    def _text(self, token: int) -> str:
        return self._checkpoint.tokenizer.decode([token]).replace("\n", "⏎") or "∅"


def _colour(confidence: float) -> str:
    return f"rgb({round(220 * (1 - confidence))},{round(60 + 140 * confidence)},60)"
