"""The results of `opdlm compare`: `compare.json`, tables, plots (accuracy over tokens and compute, retention)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from opdlm.common.files import write_json
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.observe.report import BEFORE, DYNAMIC, PERIODIC, STATIC, TEACHER
from opdlm.deploy.observe.tables import new_table

Run = tuple[str, int, Path]
"""Objective, seed, run directory."""


def write_comparison(out: Path, runs: Sequence[Run], trained: Sequence[str]) -> list[Table]:
    """Writes `compare.json`, `compare.png` and `retention.png`; returns the tables.

    `trained`: the tasks that the training prompts belong to. The other tasks show retention.
    """
    reports = {(name, seed): json.loads((folder / "report.json").read_text()) for name, seed, folder in runs}
    names = list(dict.fromkeys(name for name, _, _ in runs))
    summary = {name: _summary([r for (n, _), r in reports.items() if n == name], trained) for name in names}
    curves = {name: [_curve(folder, trained) for n, _, folder in runs if n == name] for name in names}
    first_report = next(iter(reports.values()))["by_task"]
    result = {
        "trained_tasks": list(trained),
        "seeds": sorted({seed for _, seed, _ in runs}),
        "teacher": first_report[TEACHER],
        "student_before": first_report[BEFORE],
        "objectives": summary,
        "runs": {f"{name}-seed{seed}": report for (name, seed), report in reports.items()},
    }
    write_json(out / "compare.json", result)
    _draw_curves(curves, out / "compare.png")
    _draw_retention(result, out / "retention.png")
    return [
        _budget_table(summary),
        _task_table(result, "exact match, static decoding,", "static", "exact_match"),
        _task_table(result, "exact match, dynamic decoding,", "dynamic", "exact_match"),
        _task_table(result, "solution tokens in the right place, static decoding,", "tokens", "token_match"),
    ]


def _summary(reports: Sequence[dict[str, Any]], trained: Sequence[str]) -> dict[str, Any]:
    tasks = list(reports[0]["by_task"][STATIC])
    by_task = {
        task: {
            decoding: _spread([r["by_task"][row][task]["exact_match"] for r in reports])
            for decoding, row in (("static", STATIC), ("dynamic", DYNAMIC))
        }
        | {"tokens": _spread([r["by_task"][STATIC][task]["token_match"] for r in reports])}
        for task in tasks
    }
    figures: dict[str, Any] = {"tasks": by_task}
    for group, members in (
        ("trained", [t for t in tasks if t in trained]),
        ("kept", [t for t in tasks if t not in trained]),
    ):
        if members:
            for decoding, row in (("static", STATIC), ("dynamic", DYNAMIC)):
                means = [np.mean([r["by_task"][row][t]["exact_match"] for t in members]) for r in reports]
                figures[f"{group}_{decoding}"] = _spread(means)
            steps = [np.mean([r["by_task"][DYNAMIC][t]["tokens_per_step"] for t in members]) for r in reports]
            figures[f"{group}_tokens_per_step"] = _spread(steps)
    for key in ("rollout_tokens", "compute_flops", "wall_seconds"):
        figures[key] = _spread([r[key] for r in reports])
    return figures


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "min": min(values), "max": max(values)}


def _curve(folder: Path, trained: Sequence[str]) -> dict[str, list[float]]:
    records = read_records(folder)
    rounds = {r["round"]: r for r in records if r["kind"] == "round"}
    start = next((r["compute_flops"] for r in records if r["kind"] == "offline"), 0)
    # One point per weight version. At the last version, the final evaluation replaces the periodic one.
    points = {
        r["round"]: r["by_task"] for r in records if r["kind"] == "evaluation" and r["row"] in (PERIODIC, DYNAMIC)
    }
    curve: dict[str, list[float]] = {"tokens": [], "flops": [], "trained": [], "kept": []}
    for version, by_task in sorted(points.items()):
        at = rounds.get(version, {"rollout_tokens": 0, "compute_flops": start})
        curve["tokens"].append(at["rollout_tokens"])
        curve["flops"].append(at["compute_flops"])
        for group in ("trained", "kept"):
            marks = [f["exact_match"] for t, f in by_task.items() if (t in trained) == (group == "trained")]
            curve[group].append(float(np.mean(marks)) if marks else float("nan"))
    return curve


def _draw_curves(curves: dict[str, list[dict[str, list[float]]]], file: Path) -> None:
    from opdlm.deploy.observe.figures import new_figure, save_figure

    figure, axes = new_figure(1, 2, figsize=(11, 4.6), sharey=True)
    for number, (name, runs) in enumerate(curves.items()):
        for axis, key in zip(axes, ("tokens", "flops"), strict=True):
            for group, style in (("trained", "-"), ("kept", "--")):
                length = min(len(run[group]) for run in runs)
                values = np.array([run[group][:length] for run in runs])
                if np.isnan(values).all():
                    continue
                places = np.mean([run[key][:length] for run in runs], axis=0)
                label = name if group == "trained" else None
                axis.plot(places, values.mean(0), style, color=f"C{number}", marker=".", label=label)
                axis.fill_between(places, values.min(0), values.max(0), color=f"C{number}", alpha=0.12, linewidth=0)
    axes[0].set(xlabel="response tokens", ylabel="exact match, dynamic decoding", ylim=(-0.03, 1.03))
    axes[1].set(xlabel="compute [FLOP]")
    axes[0].plot([], [], "k-", label="tasks of the training prompts")
    axes[0].plot([], [], "k--", label="other tasks (retention)")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle("mean and range over seeds")
    save_figure(figure, file)


def _draw_retention(result: dict[str, Any], file: Path) -> None:
    from opdlm.deploy.observe.figures import new_figure, save_figure

    tasks, objectives = list(result["teacher"]), result["objectives"]
    figure, axes = new_figure(2, 1, figsize=(9, 7), sharex=True)
    width = 0.8 / (len(objectives) + 2)
    places = np.arange(len(tasks)) - 0.4 + width / 2
    panels = (("static", "exact_match", "exact match"), ("tokens", "token_match", "solution tokens in the right place"))
    for axis, (key, figure_name, title) in zip(axes, panels, strict=True):
        for number, (row, colour) in enumerate((("teacher", "0.5"), ("student_before", "0.8"))):
            heights = [result[row][t][figure_name] for t in tasks]
            axis.bar(places + number * width, heights, width, color=colour, label=row.replace("_", " "))
        for number, (name, figures) in enumerate(objectives.items()):
            marks = [figures["tasks"][t][key] for t in tasks]
            errors = [[m["mean"] - m["min"] for m in marks], [m["max"] - m["mean"] for m in marks]]
            axis.bar(
                places + (number + 2) * width,
                [m["mean"] for m in marks],
                width,
                yerr=np.array(errors),
                capsize=2,
                color=f"C{number}",
                label=name,
            )
        axis.set(ylabel=title, ylim=(0, 1.05))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_title("What each objective keeps (static decoding; mean and range over seeds)")
    labels = [f"{t}\n(trained on)" if t in result["trained_tasks"] else t for t in tasks]
    axes[1].set_xticks(np.arange(len(tasks)), labels)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(objectives) + 2, fontsize=8
    )
    save_figure(figure, file)


def _budget_table(summary: dict[str, Any]) -> Table:
    figures = "static", "dynamic", "tokens per step", "response tokens", "TFLOP", "seconds"
    title = "tasks of the training prompts, in %: mean ± standard deviation over seeds"
    table = new_table(title, "objective", *figures)
    for name, of in summary.items():
        table.add_row(
            name,
            _percent(of["trained_static"]),
            _percent(of["trained_dynamic"]),
            f"{of['trained_tokens_per_step']['mean']:.2f}",
            f"{of['rollout_tokens']['mean']:,.0f}",
            f"{of['compute_flops']['mean'] / 1e12:.3g}",
            f"{of['wall_seconds']['mean']:,.0f}",
        )
    return table


def _task_table(result: dict[str, Any], title: str, key: str, figure_name: str) -> Table:
    """A row for each task, so that any number of tasks fits."""
    models = ["teacher", "student_before", *result["objectives"]]
    table = new_table(f"{title} by task, in % (*: task of the training prompts)", "task", *models)
    for task in result["teacher"]:
        before = [f"{100 * result[row][task][figure_name]:.1f}" for row in models[:2]]
        marks = [_percent(figures["tasks"][task][key]) for figures in result["objectives"].values()]
        table.add_row(task + (" *" if task in result["trained_tasks"] else ""), *before, *marks)
    return table


def _percent(spread: dict[str, float]) -> str:
    return f"{100 * spread['mean']:.1f}±{100 * spread['std']:.1f}"
