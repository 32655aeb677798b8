"""Plots without a display: a figure to draw on, and a PNG that appears whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from opdlm.common.files import atomic_file

matplotlib.use("Agg")
from matplotlib import pyplot


def new_figure(*grid: int, **how: Any) -> tuple[Any, Any]:
    """A figure and its axes. `grid`, `how`: as in `pyplot.subplots`."""
    return pyplot.subplots(*grid, layout="constrained", **how)


def save_figure(figure: Any, file: Path) -> None:
    """Writes a figure as PNG and closes it."""
    with atomic_file(file) as staging:
        figure.savefig(staging, dpi=130, format="png")
    pyplot.close(figure)
