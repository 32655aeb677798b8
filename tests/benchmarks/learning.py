"""Response tokens and seconds that the demo needs to reach a given exact match, for several settings.

    python -m tests.benchmarks.learning "" "objective.selection=all_states" "learner.batch_size=8 rollout.batch_size=64"

Each argument is one arm: overrides of deploy/demo.yaml, separated by spaces ("" changes nothing). The run is in one
process without Ray (`in_process.py`). Every few rounds, held-out problems are decoded greedily with the static and the
dynamic strategy; an arm ends when both have reached the target. The seconds are those of the rounds, without these
evaluations.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.common.config import load_config
from opdlm.common.data.tasks import get_task
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.evaluate.held_out import HeldOutProblems
from tests.benchmarks.in_process import InProcess
from tests.benchmarks.measure import OUT, write_json

RUN_FILE = Path("deploy/demo.yaml")


def evaluate(run: InProcess, problems: HeldOutProblems, limit: int) -> dict[str, float]:
    """Share of right answers with the present weights, by strategy, and tokens per denoising step of the dynamic one.

    `limit`: most response tokens.
    """
    run.student.eval()
    found = {}
    for strategy in ("low_confidence_static", "low_confidence_dynamic"):
        how = run.decoder.settings.greedy(strategy)
        decoder = BlockDecoder(
            run.student, how, run.mask_id, run.eos_ids, run.decoder.batch_size, form=run.decoder.form
        )
        trajectories, stats = decoder.decode(problems.requests(limit))
        found[strategy.removeprefix("low_confidence_")] = problems.exact_match([t.response for t in trajectories])
        found["tokens_per_step"] = stats.response_tokens / stats.denoising_steps
    return found


def arm(overrides: str, target: float, every: int, count: int) -> dict[str, Any]:
    """Trains until both strategies have reached the target, or the run ends. `count`: held-out problems."""
    folder = OUT / "learning"
    shutil.rmtree(folder, ignore_errors=True)
    config = load_config(RUN_FILE, [f"run.dir={folder}", *overrides.split()])
    run = InProcess(config, folder)
    problems = HeldOutProblems([get_task(config.data.task or "")], load_tokenizer(config.model.teacher), count)
    tokens, seconds, curve, reached = 0, 0.0, [], False
    for number, done in enumerate(run.rounds(), start=1):
        tokens, seconds = tokens + done.response_tokens, seconds + done.seconds
        if number % every == 0 or number == run.schedule.rounds:
            found = evaluate(run, problems, config.evaluation.max_new_tokens)
            curve.append({"round": number, "tokens": tokens, "seconds": seconds, **found})
            print(overrides or "unchanged", curve[-1], flush=True)
            if reached := min(found["static"], found["dynamic"]) >= target:
                break
    return {"overrides": overrides, "reached": reached, "curve": curve}


def plot(arms: list[dict[str, Any]]) -> None:
    """Writes `runs/bench/learning.png`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, unit in zip(figure.subplots(1, 2), ("tokens", "seconds"), strict=True):
        for one in arms:
            worse = [100 * min(point["static"], point["dynamic"]) for point in one["curve"]]
            axes.plot([p[unit] for p in one["curve"]], worse, marker=".", label=one["overrides"] or "unchanged")
        axes.set(xlabel=f"{'response ' if unit == 'tokens' else ''}{unit}", ylabel="exact match, worse of two, %")
    axes.legend(fontsize="x-small")
    figure.savefig(OUT / "learning.png", dpi=120)


def main() -> None:
    """Trains all arms, prints a table, writes JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", help="overrides of deploy/demo.yaml, separated by spaces")
    parser.add_argument("--target", type=float, default=0.97, help="exact match at which an arm ends")
    parser.add_argument("--every", type=int, default=5, help="rounds between evaluations")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems of an evaluation")
    chosen = parser.parse_args()
    torch.set_num_threads(2)
    OUT.mkdir(parents=True, exist_ok=True)
    arms = [arm(overrides, chosen.target, chosen.every, chosen.problems) for overrides in chosen.arms]
    table = Table(title=f"{RUN_FILE} to {chosen.target:.0%} exact match, static and dynamic")
    table.add_column("overrides")
    for name in ("reached", "rounds", "response tokens", "seconds", "static", "dynamic", "tokens per step"):
        table.add_column(name, justify="right")
    for one in arms:
        last = one["curve"][-1]
        table.add_row(
            one["overrides"] or "unchanged",
            "yes" if one["reached"] else "no",
            str(last["round"]),
            f"{last['tokens']:,}",
            f"{last['seconds']:.0f}",
            f"{last['static']:.1%}",
            f"{last['dynamic']:.1%}",
            f"{last['tokens_per_step']:.2f}",
        )
    plot(arms)
    console = Console(width=130)
    console.print(table)
    console.print(f"written: {write_json('learning', arms)}, {OUT}/learning.png")


if __name__ == "__main__":
    main()
