"""Tables that lose nothing on a terminal of 80 columns, and the short names of ways of decoding in them."""

from __future__ import annotations

import textwrap

from rich import box
from rich.table import Table

from opdlm.common.config.base import WITH_THRESHOLD

COLUMNS = 80
"""Width that every table fits into."""
_HEADER_COLUMNS = 9
"""Headers of figures are broken into lines of this width."""

_SHORT = {
    "low_confidence_static": "static",
    "low_confidence_dynamic": "dynamic",
    "entropy_bounded": "entropy",
    "sequential_dynamic": "sequential dynamic",
}


def decoding_name(strategy: str, threshold: float | None = None) -> str:
    """The short name of a way of decoding: `static`, `dynamic 0.9`. Other names stay as they are.

    `threshold`: shown where the strategy has one.
    """
    name = _SHORT.get(strategy, strategy)
    return f"{name} {threshold:g}" if strategy in WITH_THRESHOLD and threshold is not None else name


def new_table(title: str, first: str, *figures: str) -> Table:
    """A table with a column of text, which may take several lines, and columns of figures, which stay whole."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, show_edge=False)
    table.padding = (0, 0, 0, 1)
    table.add_column(first, overflow="fold")
    for name in figures:
        header = "\n".join(textwrap.wrap(name.replace("_", " "), _HEADER_COLUMNS, break_long_words=False))
        table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
    return table
