"""`opdlm eval`, `sweep`, `lm-eval`: how good a checkpoint is, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opdlm.deploy.cli.app import CheckpointFolder, app, clear_errors, model_folder_of, out, with_option_groups
from opdlm.deploy.evaluate.options import DecodingOptions, QuestionOptions, check_thinking, refuse_data_options

Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]CKPT...", help="Checkpoint folders or hub ids, each with its name in the results, as AR=FOLDER."
    ),
]


@app.command("eval")
@with_option_groups
def evaluate(
    checkpoint: CheckpointFolder,
    questions: QuestionOptions,
    decoding: DecodingOptions,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="Strategies to try; repeatable. Default: static and dynamic, with --lm-eval dynamic; verified for a "
            "lossless student."
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Threshold of the dynamic strategies.")] = 0.9,
    block_size: Annotated[int | None, typer.Option(min=1, help="Default: what the checkpoint says, else 4.")] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            callback=lambda given: given and model_folder_of(given, "--teacher"),
            help="Folder or hub id of the teacher: it answers first, and the table says how close the checkpoint's "
            "answers are: share of its score, same answers, length ratio, KL(teacher || student) on its responses.",
        ),
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            help="Re-ranking: what --output wrote for another checkpoint and the same questions; the table says by how "
            "much this one is better, with intervals."
        ),
    ] = None,
    prompt_lookup: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The autoregressive model, CKPT or --teacher, also answers with transformers' prompt lookup: drafts "
            "of so many tokens that it has read before. One prompt at a time.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Print the answers to this many questions side by side.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results and samples.")] = None,
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Tasks of lm-eval, with commas between; see --likelihood.")
    ] = None,
    likelihood: Annotated[
        str | None,
        typer.Option(
            metavar="bound",
            help="lm-eval: `bound` lets a lower bound stand for a student's likelihoods, in multiple-choice tasks. A "
            "lossless student's are exact without it.",
        ),
    ] = None,
    likelihood_samples: Annotated[
        int | None, typer.Option(min=2, help="lm-eval: samples of each bound. Default: 32.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of your own lm-eval task YAMLs.")] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="lm-eval: documents of each task; below 1 a share of them.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="lm-eval: examples in the prompt. Default: the task's.")
    ] = None,
) -> None:
    """Print the share of right answers, tokens per denoising step and tokens per second of a student or AR checkpoint.

    Examples:

        opdlm eval models/chain-teacher --task chain

        opdlm eval runs/demo/student --task chain --threshold 0.8

        opdlm eval runs/mine/student --data knowledge --teacher models/smollm2 --samples 6

        opdlm eval runs/lossless/student --task chain --teacher models/chain-teacher --batch-size 1 --prompt-lookup 10

        opdlm eval runs/rerank/rl/student --task rerank --beside opd.json

        opdlm eval runs/math/student --data math500.jsonl --answer math --chat --max-new-tokens 2048

        opdlm eval runs/math/student --lm-eval gsm8k --chat --actors 8 --gpus-per-actor 1 --output gsm8k.json
    """
    with clear_errors():
        from opdlm.deploy.evaluate.commands import EvalOptions, known_strategies, refuse_misplaced, run_eval

        options = EvalOptions(
            known_strategies(strategy or []),
            threshold,
            block_size,
            output,
            teacher,
            samples or 0,
            beside,
            prompt_lookup or 0,
        )
        if lm_eval:
            given = {"--task": questions.task, "--data": questions.data, "--problems": questions.problems}
            given |= {"--teacher": teacher, "--samples": samples, "--beside": beside, "--prompt-lookup": prompt_lookup}
            refuse_misplaced("--lm-eval", given)
            refuse_data_options("--lm-eval", questions)
            check_thinking(questions)
            from opdlm.deploy.evaluate.lm_eval import HarnessOptions, known_likelihood, run_harness

            harness = HarnessOptions(
                [name.strip() for name in lm_eval.split(",")],
                include_path,
                limit,
                fewshot,
                questions.chat,
                questions.thinking,
                known_likelihood(likelihood),
                likelihood_samples,
            )
            run_harness(checkpoint, harness, options, decoding, out)
            return
        of_harness = {"--include-path": include_path, "--limit": limit, "--fewshot": fewshot}
        refuse_misplaced("--task and --data", of_harness)
        refuse_misplaced("--task and --data", {"--likelihood": likelihood, "--likelihood-samples": likelihood_samples})
        run_eval(checkpoint, questions, options, decoding, out)


@app.command()
@with_option_groups
def sweep(
    checkpoints: Checkpoints,
    questions: QuestionOptions,
    decoding: DecodingOptions,
    threshold: Annotated[str, typer.Option(help="Thresholds of the dynamic strategies, with commas between.")] = (
        "0.5,0.7,0.9,0.95"
    ),
    block_size: Annotated[
        str | None, typer.Option(help="Block sizes, with commas between. Default: what the checkpoint says, else 4.")
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="Strategies; repeatable. Default: dynamic; verified for a lossless student. One without a threshold "
            "gives a point per block."
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--out", help="PNG; the JSON goes beside it. Default: sweep.png beside the first folder."),
    ] = None,
) -> None:
    """Accuracy against tokens per denoising step, over thresholds and block sizes: table, PNG and JSON.

    Several checkpoints share table and plot; an autoregressive one is a point in them.

    Examples:

        opdlm sweep runs/demo/student --task chain

        opdlm sweep runs/demo/student --task chain --threshold 0.5,0.9 --block-size 4,8 --out figure3.png

        opdlm sweep AR=models/chain-teacher student=runs/demo/student lossless=runs/demo-lossless/student --task chain
    """
    with clear_errors():
        from opdlm.deploy.evaluate.commands import known_strategies, read_models
        from opdlm.deploy.evaluate.sweep import SweepOptions, numbers, run_sweep

        strategies = known_strategies(strategy or [])
        thresholds = numbers(threshold, float, "--threshold", 0, 1)
        blocks = numbers(block_size, int, "--block-size", 1, 4096) if block_size else None
        models = [(name, model_folder_of(folder, name)) for name, folder in read_models(checkpoints)]
        run_sweep(models, questions, SweepOptions(strategies, thresholds, blocks), decoding, picture, out)


@app.command("rerank-report")
@with_option_groups
def rerank_report(
    models: Checkpoints,
    questions: QuestionOptions,
    decoding: DecodingOptions,
    threshold: Annotated[str, typer.Option(help="Thresholds of the dynamic strategies, with commas between.")] = (
        "1.0,0.9,0.6,0.4"
    ),
    batches: Annotated[str, typer.Option(help="Batch sizes at which speed is measured, with commas between.")] = (
        "1,8,32"
    ),
    speed_cases: Annotated[int, typer.Option(min=1, help="Cases for the measurement of speed.")] = 64,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads. Small models are faster with 1. Default: torch's."),
    ] = None,
    output: Annotated[Path, typer.Option("--out", help="JSON file; a plot goes beside it.")] = Path("report.json"),
) -> None:
    """Re-rankers side by side: recall, validity, each kind of failure, tokens per second beside an AR model.

    The first autoregressive checkpoint is the one that speeds are compared with.

    Example:

        opdlm rerank-report AR=models/rerank-teacher RL=runs/rerank/rl/student --task rerank --out report.json
    """
    with clear_errors():
        from opdlm.deploy.evaluate.commands import read_models
        from opdlm.deploy.evaluate.rerank_report import SpeedOptions, run_rerank_report
        from opdlm.deploy.evaluate.sweep import numbers

        thresholds = sorted(numbers(threshold, float, "--threshold", 0, 1), reverse=True)
        sizes = numbers(batches, int, "--batches", 1, 4096)
        chosen = [(name, model_folder_of(folder, name)) for name, folder in read_models(models)]
        speed = SpeedOptions(sizes, speed_cases)
        run_rerank_report(chosen, questions, thresholds, speed, decoding, threads, output, out)


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
