"""Matplotlib figures without a display, saved as PNG files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from opdlm.common.files import atomic_file

matplotlib.use("Agg")
from matplotlib import pyplot


def new_figure(*grid: int, **options: Any) -> tuple[Any, Any]:
    """Makes a figure and its axes. `grid` and `options`: as in `pyplot.subplots`."""
    return pyplot.subplots(*grid, layout="constrained", **options)


def save_figure(figure: Any, file: Path) -> None:
    """Saves a figure as PNG and closes it."""
    with atomic_file(file) as staging:
        figure.savefig(staging, dpi=130, format="png")
    pyplot.close(figure)
