"""`opdlm train`, `compare`, `pretrain`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from opdlm.deploy.cli.app import LARGEST_SEED, Overrides, RunFile, app, clear_errors, out


@app.command()
def train(
    run: RunFile,
    override: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run directory from its last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
    dump_rollouts: Annotated[
        bool, typer.Option("--dump-rollouts", help="Keep every scored trajectory in the run directory's rollouts/.")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(help="End by itself after the round in which these minutes are over; --resume goes on."),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Train on the rollouts that a run kept: no rollout or teacher actors."),
    ] = None,
) -> None:
    """Run on-policy distillation: decode, score, train, push, until the run's prompts are used.

    Ctrl-C (or SIGTERM, SIGHUP) ends the round, writes a checkpoint and exits; `--resume` goes on from there. A second
    one ends at once.

    Examples:

        opdlm train deploy/demo.yaml

        opdlm train deploy/demo.yaml --set run.dir=runs/mine --set learner.optimizer.lr=1e-3

        opdlm train deploy/demo.yaml --resume

        opdlm train deploy/demo.yaml --resume --minutes 110

        opdlm train deploy/demo.yaml --dump-rollouts

        opdlm train deploy/demo.yaml --replay runs/demo/rollouts --set run.dir=runs/jsd --set objective.divergence=jsd
    """
    with clear_errors():
        from opdlm.common.config import load_config

        flags = ["run.dump_rollouts=true"] if dump_rollouts else []
        flags += [f"run.max_minutes={minutes!r}"] if minutes is not None else []
        flags += [f"run.replay={json.dumps(str(replay))}"] if replay else []
        config = load_config(run, [*(override or []), *flags])
        if dry_run:
            from opdlm.deploy.run.plan import show_plan

            show_plan(config, out, resume=resume)
            return
        from opdlm.deploy.run.train import train as run_training

        code = run_training(config, resume, out)
    raise typer.Exit(code)


@app.command()
def compare(
    run: RunFile,
    objectives: Annotated[
        str, typer.Option(help="Comma-separated: opd, opd_random_mask, off_policy_kd, cft.")
    ] = "opd,opd_random_mask,off_policy_kd,cft",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
    destination: Annotated[
        Path | None, typer.Option("--out", help="Folder of the runs and the comparison. Default: the file's run.dir.")
    ] = None,
    override: Overrides = None,
) -> None:
    """Run objectives side by side under one budget: tables, accuracy over tokens and compute, retention of skills.

    Each run is a folder of its own; calling again goes on where it stopped.

    Example:

        opdlm compare deploy/retention.yaml --objectives opd,cft --seeds 0,1,2
    """
    with clear_errors():
        from opdlm.common.config import load_config
        from opdlm.common.errors import OpdlmError
        from opdlm.deploy.run.compare import run_comparison

        config = load_config(run, override or [])
        given = [seed.strip() for seed in seeds.split(",")]
        if not all(seed.isascii() and seed.isdigit() and len(seed) <= 20 for seed in given):
            raise OpdlmError(f"--seeds: found {seeds!r}; expected numbers such as 0,1,2")
        code = run_comparison(
            config,
            [name.strip() for name in objectives.split(",")],
            [int(seed) for seed in given],
            Path(os.path.realpath(destination or config.run.dir)),
            out,
        )
    raise typer.Exit(code)


@app.command()
def pretrain(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New checkpoint folder.")],
    task: Annotated[str | None, typer.Option(help="Built-in task, such as chain; several joined by +.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file to learn instead, character by character.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Rows with `prompt` and `response` to learn instead, such as ml100k's train.jsonl."),
    ] = None,
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 96,
    layers: Annotated[int, typer.Option(min=1, help="Depth of the model.")] = 3,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads; half as many key/value heads.")] = 4,
    context: Annotated[int, typer.Option(min=1, help="Longest sequence, in tokens.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 900,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 64,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of weights and data.")] = 0,
    answer_weight: Annotated[
        float,
        typer.Option(min=0, help="Of a re-ranking, how much a token of the answer counts beside one of the reasoning."),
    ] = 1.0,
) -> None:
    """Train a small autoregressive teacher from scratch: a Qwen3, plain next-token cross-entropy.

    Examples:

        opdlm pretrain models/chain-teacher --task chain

        opdlm pretrain models/poet --text poems.txt --context 256 --steps 3000
    """
    with clear_errors():
        from opdlm.deploy.tools.pretrain import PretrainSettings, run_pretrain

        settings = PretrainSettings(hidden_size, layers, heads, context, steps, batch_size, lr, seed, answer_weight)
        run_pretrain(destination, task, text, data, settings, out)
