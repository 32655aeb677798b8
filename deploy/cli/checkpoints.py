"""`opdlm convert`, `export`, `generate`: commands about one checkpoint folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from opdlm.common.config.schema import Strategy
from opdlm.common.export.names import LayoutName
from opdlm.deploy.cli.app import LARGEST_SEED, CheckpointFolder, app, clear_errors, out
from opdlm.deploy.evaluate.options import Chat, Thinking


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Autoregressive checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New student folder.")],
    block_size: Annotated[int, typer.Option(min=1, help="Tokens in a block, written to config.json.")] = 4,
    block_grid: Annotated[Literal["absolute", "response"], typer.Option(help="Block grid, likewise.")] = "absolute",
    mask_token: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Mask token; added if new. Default: the tokenizer's, else <|MASK|>."),
    ] = None,
    logit_shift: Annotated[
        bool | None,
        typer.Option(
            "--logit-shift/--no-logit-shift",
            help="Predict a token at the position before it, as the AR model does. Default: no, as in the paper.",
        ),
    ] = None,
    context: Annotated[
        Literal["block_causal", "causal"] | None,
        typer.Option(
            help="What clean tokens attend to: their whole block (the paper, the default) or the tokens before them. "
            "`causal` needs `--block-grid response`."
        ),
    ] = None,
) -> None:
    """Make a student of an AR checkpoint: the same weights, and a mask token where there is none.

    Examples:

        opdlm convert models/chain-teacher models/chain-student --block-size 4

        opdlm convert models/mine models/mine-student --mask-token '<|MASK|>'
    """
    with clear_errors():
        from opdlm.common.model.convert import convert_checkpoint
        from opdlm.common.model.facts import read_facts

        mask_id = convert_checkpoint(source, destination, block_size, block_grid, mask_token, logit_shift, context)
        if note := read_facts(source).end_tokens_note:
            print(f"opdlm: {note}", file=sys.stderr)
        form = read_facts(destination).form
        made = f"mask token id {mask_id}, block size {block_size}, {block_grid} grid, {form}"
        out.print(f"{destination}: {made}", highlight=False)


@app.command()
def export(
    checkpoint: CheckpointFolder,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    layout: Annotated[
        LayoutName,
        typer.Option(
            help="`a2d-*`: the public OPDLM checkpoints', for AutoModelForMaskedLM. `sdar`: what SGLang and LMDeploy "
            "serve. The others: the plain network, which other programs take for an autoregressive model."
        ),
    ],
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, for the card. Default: the run's teacher, by name.")
    ] = None,
) -> None:
    """Write a student in a layout that other programs load, with a model card (README.md) beside the weights.

    Examples:

        opdlm export runs/demo/student exported/a2d --layout a2d-qwen3

        opdlm export runs/mine/student exported/sdar --layout sdar --base-model Qwen/Qwen3-0.6B
    """
    with clear_errors():
        from opdlm.common.export import export as write_export

        for warning in write_export(checkpoint, destination, layout, base_model):
            print(f"opdlm: warning: {warning}", file=sys.stderr)
        out.print(f"{destination}: {layout} layout", highlight=False)


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
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of sampling.")] = 0,
    chat: Chat = False,
    thinking: Thinking = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Show each block being unmasked, confidence as colour.")
    ] = False,
) -> None:
    """Decode prompts with a student (block decoding) or an AR checkpoint, and show the text.

    Examples:

        opdlm generate runs/demo/student --prompt '47+8-3='

        opdlm generate runs/demo/student --prompt '47+8-3=' --trace

        opdlm generate runs/math-thinking/student --prompt 'What is 6 times 7?' --chat --thinking --max-new-tokens 2000
    """
    with clear_errors():
        from opdlm.deploy.tools.generate import run_generate

        run_generate(
            checkpoint,
            prompt,
            block_size,
            trace,
            out,
            max_new_tokens=max_new_tokens,
            strategy=strategy,
            threshold=threshold,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            chat=chat,
            thinking=thinking,
            seed=seed,
        )
