"""`opdlm convert`, `generate`: commands about one checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from common.config.schema import Strategy
from deploy.cli.app import CheckpointFolder, app, clear_errors, out


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
    with clear_errors():
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
    with clear_errors():
        from deploy.generate_job import GenerateOptions, run_generate

        options = GenerateOptions(
            max_new_tokens, strategy, threshold, block_size, temperature, top_k, top_p, seed, trace
        )
        run_generate(checkpoint, prompt, options, out)
