"""The report of a run (`report.json`, `report.png` and a table), made from the run's records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from opdlm.common.files import write_json
from opdlm.deploy.observe.ledger import read_ledger
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.observe.tables import decoding_name, new_table

TEACHER, BEFORE, STATIC, DYNAMIC = "teacher", "student before", "student static", "student dynamic"
VERIFIED = "student verified"
PERIODIC = "student"
"""Names of evaluation rows."""
DATA_FIGURES = ("data_right", "of_teacher", "agreement", "token_agreement", "length_ratio", "held_out_kl")
"""Figures of an evaluation about the questions of `evaluation.data`."""


def write_report(run_dir: Path, samples: tuple[int, int] | None = None) -> Table:
    """Writes `report.json` and `report.png`; returns the table of the evaluations, or else of what the run did.

    `samples`: (samples in a round, samples in the run), to count what became of them (`samples_trained`,
    `samples_lost`, ...). None: nothing is counted.
    """
    records = read_records(run_dir)
    rows = {r["row"]: r for r in records if r["kind"] == "evaluation"}
    rounds = [r for r in records if r["kind"] == "round"]
    last = rounds[-1] if rounds else {"rollout_tokens": 0, "step": 0, "round": 0}
    report: dict[str, Any] = {
        "teacher_exact_match": _figure(rows, TEACHER, "exact_match"),
        "student_exact_match_before": _figure(rows, BEFORE, "exact_match"),
        "student_exact_match_static": _figure(rows, STATIC, "exact_match"),
        "student_exact_match_dynamic": _figure(rows, DYNAMIC, "exact_match"),
        "tokens_per_step_dynamic": _figure(rows, DYNAMIC, "tokens_per_step"),
        "student_exact_match_verified": _figure(rows, VERIFIED, "exact_match"),
        "tokens_per_step_verified": _figure(rows, VERIFIED, "tokens_per_step"),
        "rollout_tokens": last["rollout_tokens"],
        "optimizer_steps": last["step"],
        "weight_version": last["round"],
        "wall_seconds": records[-1]["wall_seconds"] if records else 0.0,
        "compute_flops": last.get("compute_flops", 0),
        "gpu_hours": _gpu_hours(records, last),
        **_learning(records),
        **(read_ledger(records, *samples).figures() if samples else {}),
        "data": {row: _about_data(r) for row, r in rows.items() if row != PERIODIC and r.get("data_right") is not None},
        "best": kept_best(run_dir, records),
        "by_task": {row: r["by_task"] for row, r in rows.items() if row != PERIODIC},
    }
    write_json(run_dir / "report.json", report)
    _draw(records, run_dir / "report.png")
    shown = rows.keys() & {TEACHER, BEFORE, STATIC, DYNAMIC, VERIFIED}
    return _evaluated({row: rows[row] for row in shown}) if shown else _done(report)


def figure_of(evaluation: Mapping[str, Any], figure: str) -> float:
    """A figure of an evaluation, given as its record or as the dict of an `EvaluationResult`; NaN where it has none.

    `figure`: its name, or that of a task or of a kind of questions before it, as in `add/exact_match`.
    """
    group, _, name = figure.rpartition("/")
    of_group = {**evaluation.get("by_kind", {}), **evaluation["by_task"]}
    value = of_group[group][name] if group else evaluation[name]
    return float("nan") if value is None else float(value)


def best_folder(run_dir: Path, version: int) -> Path:
    """Where a run keeps the student of a version while that is its best one (`checkpoint.keep_best`)."""
    return run_dir / "best" / f"round-{version:06d}"


def kept_best(run_dir: Path, records: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best student of a run: its `round`, `figure`, `mode`, `value` and `folder`; None where none is kept."""
    for record in reversed([record for record in records if "best_by" in record]):
        folder = best_folder(run_dir, record["round"])
        if folder.is_dir():
            mode, figure = record["best_by"].split(" ", 1)
            value = figure_of(record, figure)
            return {"round": record["round"], "figure": figure, "mode": mode, "value": value, "folder": str(folder)}
    return None


def _figure(rows: dict[str, dict[str, Any]], row: str, figure: str) -> float | None:
    return rows[row][figure] if row in rows else None


def _about_data(record: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation says of the questions of `evaluation.data`."""
    return {name: record.get(name) for name in DATA_FIGURES} | {"by_kind": record.get("by_kind", {})}


def _gpu_hours(records: list[dict[str, Any]], last: dict[str, Any]) -> float:
    """GPUs that were reserved times their time, to the last record; 0 for a run without GPUs."""
    after = records[-1]["wall_seconds"] - last["wall_seconds"] if "gpu_hours" in last else 0.0
    return last.get("gpu_hours", 0.0) + last.get("gpus_reserved", 0.0) * after / 3600


def _learning(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Mean loss and tokens per denoising step in the first round and in the last; None where there are none."""
    losses: dict[int, list[float]] = {}
    for record in records:
        if record["kind"] == "step":
            losses.setdefault(record["round"], []).append(record["loss"])
    means = [sum(of_round) / len(of_round) for _, of_round in sorted(losses.items())]
    speeds = [r["tokens_per_step"] for r in records if r["kind"] == "round" and "tokens_per_step" in r]
    return {
        f"{name}_{place}_round": values[index] if values else None
        for name, values in (("loss", means), ("tokens_per_step", speeds))
        for place, index in (("first", 0), ("last", -1))
    }


def _evaluated(rows: dict[str, dict[str, Any]]) -> Table:
    """The final evaluations."""
    problems = max(r["problems"] for r in rows.values())
    figures = ["exact match", "tokens per denoising step", "tokens per second"]
    has_data = any(r.get("data_right") is not None for r in rows.values())
    figures += ["of the teacher's score", "KL (nats)"] if has_data else []
    table = new_table(f"{problems:,} held-out problems", "model", *figures)
    for row in (TEACHER, BEFORE, STATIC, DYNAMIC, VERIFIED):
        if row in rows:
            r = rows[row]
            how = _decoding(r, verified=VERIFIED in rows)
            named = {TEACHER: "teacher (autoregressive)", BEFORE: f"student before ({how})"}
            title = named.get(row, f"student after, {how}")
            shown = [f"{r['exact_match']:.1%}", f"{r['tokens_per_step']:.2f}", f"{r['tokens_per_second']:,.0f}"]
            if has_data:
                share, kl = r.get("of_teacher"), r.get("held_out_kl")
                shown += ["-" if share is None else f"{share:.1%}", "-" if kl is None else f"{kl:.3f}"]
            table.add_row(title, *shown)
    return table


def _done(report: dict[str, Any]) -> Table:
    """What a run without evaluations did."""
    table = new_table("what the run did (it evaluated nothing)", "what", "figure")
    table.show_header = False
    for what, figure in {
        "rounds": "weight_version",
        "optimizer steps": "optimizer_steps",
        "response tokens": "rollout_tokens",
    }.items():
        table.add_row(what, f"{report[figure]:,}")
    for what, figure, form in (
        ("mean loss of the first and last round", "loss", "{:.4f}"),
        ("tokens per denoising step, first and last round", "tokens_per_step", "{:.2f}"),
    ):
        values = [report[f"{figure}_{place}_round"] for place in ("first", "last")]
        if None not in values:
            table.add_row(what, " → ".join(form.format(value) for value in values))
    minutes, seconds = divmod(round(report["wall_seconds"]), 60)
    table.add_row("time", f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s")
    return table


def _decoding(record: dict[str, Any], verified: bool) -> str:
    """The short name of an evaluation's way of decoding. `verified`: whether the run ends with verified decoding.

    Records of earlier versions do not name it.
    """
    if "strategy" in record:
        return decoding_name(record["strategy"])
    return "verified" if verified else "static" if record["row"] in (BEFORE, STATIC) else "dynamic"


def _draw(records: list[dict[str, Any]], file: Path) -> None:
    from opdlm.deploy.observe.figures import new_figure, save_figure

    rounds = [r for r in records if r["kind"] == "round"]
    tokens_at = {0: 0} | {r["round"]: r["rollout_tokens"] for r in rounds}
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    parallel = [r for r in evaluations if r["row"] in (PERIODIC, DYNAMIC, VERIFIED) and r["round"] in tokens_at]
    points = sorted((tokens_at[r["round"]], r["exact_match"], r["tokens_per_step"]) for r in parallel)
    teacher = [r for r in evaluations if r["row"] == TEACHER]
    both = bool(points or teacher)  # a run without evaluations has the lower plot only
    figure, axes = new_figure(1 + both, 1, figsize=(7, 6.5 if both else 3.6), sharex=True, squeeze=False)
    top, bottom = axes[0, 0], axes[-1, 0]
    if teacher:
        top.axhline(teacher[-1]["exact_match"], color="0.5", linestyle="--", label="teacher (autoregressive)")
    if points:
        how = _decoding(parallel[-1], verified=parallel[-1]["row"] == VERIFIED)
        places, matches, speeds = zip(*points, strict=True)
        top.plot(places, matches, marker="o", label=f"student, {how} decoding")
        bottom.plot(places, speeds, marker="o", label=f"evaluation, {how} decoding")
    measured = [(r["rollout_tokens"], r["tokens_per_step"]) for r in rounds if "tokens_per_step" in r]
    if measured:
        bottom.plot(*zip(*measured, strict=True), color="C1", alpha=0.6, linewidth=1, label="training rollouts")
    if both:
        top.set(ylabel="exact match", ylim=(-0.03, 1.03), title="Exact match on held-out problems")
    bottom.set(
        ylabel="tokens per denoising step", xlabel="rollout tokens", title="Decoding parallelism", ylim=(0, None)
    )
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="lower right")
    save_figure(figure, file)
