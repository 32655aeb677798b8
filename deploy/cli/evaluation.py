"""`opdlm eval`, `sweep`, `lm-eval`: how good a checkpoint is, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from opdlm.deploy.cli.app import Chat, CheckpointFolder, Thinking, app, clear_errors, out

TaskName = Annotated[str | None, typer.Option(help="Built-in task, as chain.")]
DataFile = Annotated[Path | None, typer.Option("--data", help="JSONL file of prompts with reference answers.")]
PromptField = Annotated[str, typer.Option(help="Key of the prompt in a line of --data.")]
AnswerField = Annotated[str, typer.Option(help="Key of the reference answer.")]
AnswerKind = Annotated[
    Literal["exact", "math"],
    typer.Option("--answer", help="`exact` text, or `math`: the value of the last \\boxed{} or number (math-verify)."),
]
Problems = Annotated[int | None, typer.Option(min=1, help="Problems; default 1,000 of a task, all rows of --data.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Problems decoded side by side, in each actor.")]
Actors = Annotated[int, typer.Option(min=0, help="Decode on so many Ray actors; 0: in this process.")]
GpusPerActor = Annotated[float, typer.Option(min=0, help="GPUs of each actor.")]


@app.command("eval")
def evaluate(
    checkpoint: CheckpointFolder,
    task: TaskName = None,
    data: DataFile = None,
    prompt_field: PromptField = "prompt",
    answer_field: AnswerField = "answer",
    answer: AnswerKind = "exact",
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Tasks of lm-eval, with commas between; they must generate.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of your own lm-eval task YAMLs.")] = None,
    limit: Annotated[float | None, typer.Option(min=0, help="Documents of each lm-eval task; below 1 a share.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="lm-eval: examples in the prompt. Default: task's.")
    ] = None,
    problems: Problems = None,
    chat: Chat = False,
    thinking: Thinking = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="Strategies to try; repeatable. Default: static and dynamic; lm-eval: dynamic."),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Threshold of low_confidence_dynamic.")] = 0.9,
    block_size: Annotated[int | None, typer.Option(min=1, help="Default: what the checkpoint says, else 4.")] = None,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 128,
    actors: Actors = 0,
    gpus_per_actor: GpusPerActor = 0.0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results (lm-eval: and samples).")] = None,
) -> None:
    """Share of right answers, tokens per denoising step and tokens per second; AR and student alike.

    Examples:

        opdlm eval models/chain-teacher --task chain

        opdlm eval runs/demo/student --task chain --threshold 0.8

        opdlm eval runs/math/student --data math500.jsonl --answer math --chat --max-new-tokens 2048

        opdlm eval runs/math/student --lm-eval gsm8k --chat --actors 8 --gpus-per-actor 1 --output gsm8k.json
    """
    with clear_errors():
        from opdlm.deploy.evaluate.commands import EvalOptions, refuse_misplaced, run_eval, strategies

        default = ["low_confidence_dynamic"] if lm_eval else ["low_confidence_static", "low_confidence_dynamic"]
        options = EvalOptions(
            strategies(strategy or default),
            threshold,
            block_size,
            max_new_tokens,
            batch_size,
            actors,
            gpus_per_actor,
            output,
        )
        if lm_eval:
            refuse_misplaced("--lm-eval", {"--task": task, "--data": data, "--problems": problems})
            from opdlm.deploy.evaluate.lm_eval import HarnessOptions, run_harness

            run_harness(
                checkpoint,
                HarnessOptions(lm_eval.split(","), include_path, limit, fewshot, chat, thinking),
                options,
                out,
            )
            return
        refuse_misplaced("--task and --data", {"--include-path": include_path, "--limit": limit, "--fewshot": fewshot})
        from opdlm.deploy.evaluate.questions import QuestionSource

        source = QuestionSource(task, data, prompt_field, answer_field, answer, problems, chat, thinking)
        run_eval(checkpoint, source, options, out)


@app.command()
def sweep(
    checkpoint: CheckpointFolder,
    task: TaskName = None,
    data: DataFile = None,
    prompt_field: PromptField = "prompt",
    answer_field: AnswerField = "answer",
    answer: AnswerKind = "exact",
    problems: Problems = None,
    chat: Chat = False,
    thinking: Thinking = None,
    threshold: Annotated[str, typer.Option(help="Thresholds of low_confidence_dynamic, with commas between.")] = (
        "0.5,0.7,0.9,0.95"
    ),
    block_size: Annotated[
        str | None, typer.Option(help="Block sizes, with commas between. Default: what the checkpoint says, else 4.")
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="Strategies; repeatable. Default: dynamic. One without a threshold is a point a block size."),
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 128,
    actors: Actors = 0,
    gpus_per_actor: GpusPerActor = 0.0,
    picture: Annotated[
        Path | None, typer.Option("--out", help="PNG; the JSON goes beside it. Default: sweep.png beside the folder.")
    ] = None,
) -> None:
    """Accuracy against tokens per denoising step, over thresholds and block sizes: table, PNG and JSON.

    Examples:

        opdlm sweep runs/demo/student --task chain

        opdlm sweep runs/demo/student --task chain --threshold 0.5,0.9 --block-size 4,8 --out figure3.png
    """
    with clear_errors():
        from opdlm.deploy.evaluate.commands import EvalOptions, strategies
        from opdlm.deploy.evaluate.questions import QuestionSource
        from opdlm.deploy.evaluate.sweep import numbers, run_sweep

        options = EvalOptions(
            strategies(strategy or ["low_confidence_dynamic"]),
            0.9,
            None,
            max_new_tokens,
            batch_size,
            actors,
            gpus_per_actor,
        )
        thresholds = numbers(threshold, float, "--threshold", 0, 1)
        blocks = numbers(block_size, int, "--block-size", 1, 4096) if block_size else None
        source = QuestionSource(task, data, prompt_field, answer_field, answer, problems, chat, thinking)
        run_sweep(checkpoint, source, thresholds, blocks, options, picture, out)


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def lm_eval_command(context: typer.Context) -> None:
    """lm-eval's own command line, which then knows `--model opdlm`; everything after it is passed on.

    Model arguments: pretrained, strategy, threshold, block_size, batch_size, max_new_tokens, chat_template,
    enable_thinking, seed.

    Example:

        opdlm lm-eval run --model opdlm --model_args pretrained=runs/math/student,batch_size=64 --tasks gsm8k
    """
    with clear_errors():
        from opdlm.deploy.evaluate.lm_eval import pass_through

        pass_through(context.args)
