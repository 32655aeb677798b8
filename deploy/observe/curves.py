"""`opdlm curves`: what runs have learned over response tokens, of `evaluation.data`, as a table, PNG and JSON.

Three panels: the share of the teacher's score, tokens per denoising step, and KL(teacher || student), all of parallel
decoding (in the student's order, or verified), over the response tokens that were trained on. The last evaluation that
decoded one token a step is a mark of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from opdlm.common.errors import OpdlmError
from opdlm.common.files import write_json
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.observe.report import DYNAMIC, PERIODIC, STATIC, VERIFIED
from opdlm.deploy.observe.tables import new_table

_PANELS = (
    ("of_teacher", "share of the teacher's score", "knowledge"),
    ("tokens_per_step", "tokens per denoising step", "parallel decoding"),
    ("held_out_kl", "KL(teacher || student) [nats]", "divergence on held-out rollouts"),
)
_FIGURES = ("of_teacher", "data_right", "tokens_per_step", "held_out_kl", "agreement", "length_ratio")


def run_curve(run_dir: Path) -> dict[str, Any]:
    """The evaluations of one run.

    Returns: `name`; `dynamic`, a point for each evaluated weight version in their order, the last evaluation in place
        of the periodic one of the same version; `static`, the last one with one token a step, or None. A point
        has `round`, `response_tokens`, `by_kind` and the figures of `EvaluationResult`.

    Raises:
        OpdlmError: the folder holds no run that evaluated on `evaluation.data`.
    """
    records = read_records(run_dir)
    tokens_at = {0: 0} | {r["round"]: r["rollout_tokens"] for r in records if r["kind"] == "round"}
    rows = [r for r in records if r["kind"] == "evaluation" and r.get("data_right") is not None]
    points = {r["round"]: _point(r, tokens_at) for r in rows if r["row"] in (PERIODIC, DYNAMIC, VERIFIED)}
    if not points:
        raise OpdlmError(
            f"{run_dir}: found no evaluation of a student on evaluation.data (metrics.jsonl); give run directories of "
            "runs that have it, and evaluation.every_rounds"
        )
    static = [_point(r, tokens_at) for r in rows if r["row"] == STATIC]
    return {
        "name": run_dir.resolve().name,
        "dynamic": [points[version] for version in sorted(points)],
        "static": static[-1] if static else None,
    }


def _point(record: dict[str, Any], tokens_at: dict[int, int]) -> dict[str, Any]:
    at = {"round": record["round"], "response_tokens": tokens_at.get(record["round"], 0)}
    return at | {name: record.get(name) for name in _FIGURES} | {"by_kind": record.get("by_kind", {})}


def write_curves(run_dirs: Sequence[Path], picture: Path, marks: dict[str, float]) -> Table:
    """Draws the curves of runs to a PNG and writes their points as JSON beside it; returns a table of the last figures.

    Args:
        marks: by figure (`of_teacher`, `tokens_per_step`, `held_out_kl`), where a line is drawn across its panel.

    Raises:
        OpdlmError: see `run_curve`.
    """
    curves = [run_curve(folder) for folder in run_dirs]
    _draw(curves, picture, marks)
    write_json(picture.with_suffix(".json"), {"runs": curves, "marks": marks})
    figures = "response tokens", "one token a step, of teacher", "parallel, of teacher", "tokens per step", "KL (nats)"
    table = new_table("the last evaluation of each run", "run", *figures)
    for curve in curves:
        last, static = curve["dynamic"][-1], curve["static"] or {}
        share = [_form(point.get("of_teacher"), "{:.1%}") for point in (static, last)]
        speed, kl = _form(last["tokens_per_step"], "{:.2f}"), _form(last["held_out_kl"], "{:.3f}")
        table.add_row(curve["name"], f"{last['response_tokens']:,}", *share, speed, kl)
    return table


def _draw(curves: Sequence[dict[str, Any]], file: Path, marks: dict[str, float]) -> None:
    from opdlm.deploy.observe.figures import new_figure, save_figure

    figure, axes = new_figure(1, len(_PANELS), figsize=(13, 4.2))
    for axis, (name, label, title) in zip(axes, _PANELS, strict=True):
        for number, curve in enumerate(curves):
            points = [p for p in curve["dynamic"] if p[name] is not None]
            places, values = [p["response_tokens"] for p in points], [p[name] for p in points]
            axis.plot(places, values, marker=".", color=f"C{number}", label=curve["name"])
            if (static := curve["static"]) and static[name] is not None:
                axis.plot(static["response_tokens"], static[name], "s", color=f"C{number}", mfc="none")
        if name in marks:
            axis.axhline(marks[name], color="0.5", linestyle=":")
        if name == "of_teacher":
            axis.axhline(1.0, color="0.5", linestyle="--", linewidth=1, label="teacher")
            axis.plot([], [], "ks", mfc="none", label="one token a step")
        axis.set(xlabel="response tokens", ylabel=label, title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right")
    save_figure(figure, file)


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
