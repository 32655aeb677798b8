"""`opdlm`: the command line. Each command's work is in a module of its own; heavy imports wait until it is called."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from common.config.schema import Strategy
from common.errors import OpdlmError

app = typer.Typer(
    help="Turn an autoregressive language model into a diffusion language model, on a Ray cluster.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)
out = Console()

CheckpointFolder = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder in Hugging Face layout.")]


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """A user's mistake is printed as it is, without a traceback, and exits with 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        yield
    except OpdlmError as error:
        for line in str(error).splitlines():
            print(f"opdlm: {line}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file; see deploy/*.yaml.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting; repeatable.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run directory from its last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
) -> None:
    """Run on-policy distillation: decode, score, train, push, until the run's prompts are used.

    Ctrl-C (or SIGTERM) ends the round, writes a checkpoint and exits; `--resume` goes on from there.

    Examples:

        opdlm train deploy/demo.yaml

        opdlm train deploy/demo.yaml --set run.dir=runs/mine --set learner.optimizer.lr=1e-3

        opdlm train deploy/demo.yaml --resume
    """
    with _clear_errors():
        from common.config import load_config

        config = load_config(run, override or [])
        if dry_run:
            from deploy.dry_run import show_plan

            show_plan(config, out)
            return
        from deploy.train_job import train as run_job

        code = run_job(config, resume, out)
    raise typer.Exit(code)


@app.command()
def pretrain(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New checkpoint folder.")],
    task: Annotated[str | None, typer.Option(help="Built-in task: chain.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file to learn instead, character by character.")] = None,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 96,
    layers: Annotated[int, typer.Option(help="Depth of the model.")] = 3,
    heads: Annotated[int, typer.Option(help="Attention heads; half as many key/value heads.")] = 4,
    context: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = 128,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 600,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
) -> None:
    """Train a small autoregressive teacher from scratch: a Qwen3, plain next-token cross-entropy.

    Examples:

        opdlm pretrain models/chain-teacher --task chain

        opdlm pretrain models/poet --text poems.txt --context 256 --steps 3000
    """
    with _clear_errors():
        from deploy.pretrain_job import run_pretrain
        from learner.pretrain import PretrainSettings

        settings = PretrainSettings(hidden_size, layers, heads, context, steps, batch_size, lr, seed)
        run_pretrain(destination, task, text, settings, out)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Autoregressive checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New student folder.")],
    block_size: Annotated[int, typer.Option(min=1, help="Tokens in a block, written to config.json.")] = 4,
    block_grid: Annotated[Literal["absolute", "response"], typer.Option(help="Block grid, likewise.")] = "absolute",
    layout: Annotated[
        Literal["qwen3", "a2d-qwen3"],
        typer.Option(help="`qwen3` loads in plain transformers; `a2d-qwen3` is the public OPDLM checkpoints' name."),
    ] = "qwen3",
) -> None:
    """Make a student of an AR checkpoint: the same weights, and a mask token where there is none.

    Example:

        opdlm convert models/chain-teacher models/chain-student --block-size 4
    """
    with _clear_errors():
        from common.convert import convert as run_convert

        mask_id = run_convert(source, destination, block_size, block_grid, layout)
        out.print(
            f"{destination}: mask token id {mask_id}, block size {block_size}, {block_grid} grid", highlight=False
        )


@app.command()
def generate(
    checkpoint: CheckpointFolder,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Prompt text; repeatable.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 64,
    strategy: Annotated[Strategy, typer.Option(help="Remasking strategy.")] = "low_confidence_dynamic",
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Threshold of low_confidence_dynamic.")] = 0.9,
    block_size: Annotated[int | None, typer.Option(min=1, help="Default: what the checkpoint says, else 4.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="1 is all.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    trace: Annotated[
        bool, typer.Option("--trace", help="Show each block being unmasked, confidence as colour.")
    ] = False,
) -> None:
    """Decode prompts with a student (block decoding) or an AR checkpoint (greedy), and show the text.

    Examples:

        opdlm generate runs/demo/student --prompt '47+8-3='

        opdlm generate runs/demo/student --prompt '47+8-3=' --trace
    """
    with _clear_errors():
        from deploy.generate_job import GenerateOptions, run_generate

        options = GenerateOptions(
            max_new_tokens, strategy, threshold, block_size, temperature, top_k, top_p, seed, trace
        )
        run_generate(checkpoint, prompt, options, out)


@app.command("eval")
def evaluate(
    checkpoint: CheckpointFolder,
    task: Annotated[str, typer.Option(help="Built-in task: chain.")],
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 1000,
    strategy: Annotated[
        list[str] | None, typer.Option(help="Strategies to try; repeatable. Default: static and dynamic.")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Threshold of low_confidence_dynamic.")] = 0.9,
    block_size: Annotated[int | None, typer.Option(min=1, help="Default: what the checkpoint says, else 4.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Problems decoded side by side.")] = 128,
) -> None:
    """Exact match, tokens per denoising step and tokens per second on held-out problems; AR and student alike.

    Examples:

        opdlm eval models/chain-teacher --task chain

        opdlm eval runs/demo/student --task chain --threshold 0.8
    """
    with _clear_errors():
        from deploy.eval_job import EvalOptions, run_eval, strategies

        options = EvalOptions(
            problems,
            strategies(strategy or ["low_confidence_static", "low_confidence_dynamic"]),
            threshold,
            block_size,
            max_new_tokens,
            batch_size,
        )
        run_eval(checkpoint, task, options, out)


if __name__ == "__main__":
    app()
