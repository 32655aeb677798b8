"""`opdlm convert`, `export`, `push`, `generate`: commands about one checkpoint folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from opdlm.common.config.base import DecodingOrder
from opdlm.common.export.names import LayoutName
from opdlm.deploy.cli.app import LARGEST_SEED, CheckpointFolder, app, clear_errors, out, show_hub_bars
from opdlm.deploy.evaluate.options import Chat, Thinking, UsualStrategy


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Autoregressive checkpoint folder, GGUF file, or hub id.")
    ],
    destination: Annotated[
        Path | None, typer.Argument(metavar="DST", help="New student folder. Not needed with --teacher.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(metavar="DST", help="Write the autoregressive model itself as an ordinary Hugging Face folder."),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="GGUF only: number format of the weights. Default: bfloat16; float32 keeps every number."),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a block, written to config.json. Default: 4.")
    ] = None,
    block_grid: Annotated[
        Literal["absolute", "response"] | None, typer.Option(help="Block grid, likewise. Default: absolute.")
    ] = None,
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
    decoding_order: Annotated[
        DecodingOrder | None,
        typer.Option(
            help="What a step reveals first unless a strategy is asked for, written to config.json: the most confident "
            "position or the leftmost. Default: the source's, else confidence."
        ),
    ] = None,
) -> None:
    """Make a student of an AR checkpoint: the same weights, and a mask token where there is none.

    Examples:

        opdlm convert models/chain-teacher models/chain-student --block-size 4

        opdlm convert Qwen/Qwen3-0.6B models/qwen-student

        opdlm convert SmolLM2-135M-Instruct.Q4_1.gguf --teacher models/smollm2

        opdlm convert models/mine models/mine-student --mask-token '<|MASK|>'
    """
    with clear_errors():
        from opdlm.deploy.tools.convert import StudentSettings, run_convert

        student = StudentSettings(block_size, block_grid, mask_token, logit_shift, context, decoding_order)
        run_convert(source, destination, teacher, student, dtype, out)


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
def push(
    checkpoint: CheckpointFolder,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Model repository on the Hugging Face hub.")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Who sees a new repository. Default: the hub's own (public, or as ORG decides)."
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, for a card that is written here.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder and list what would be sent; ask and send nothing.")
    ] = False,
) -> None:
    """Upload a student or an export to the hub, with its model card, in one commit.

    The token is that of `hf auth login` or HF_TOKEN. A folder without a card (README.md) gets one on the hub.

    Examples:

        opdlm push runs/mine/student me/mine-opdlm --private --dry-run

        opdlm push exported/a2d me/mine-opdlm --public
    """
    with clear_errors():
        show_hub_bars()
        from opdlm.deploy.tools.push import run_push

        run_push(checkpoint, repository, private, base_model, dry_run, out)


@app.command()
def generate(
    checkpoint: CheckpointFolder,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Prompt text; repeatable.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 64,
    strategy: UsualStrategy = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Threshold of the dynamic strategies.")] = 0.9,
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
