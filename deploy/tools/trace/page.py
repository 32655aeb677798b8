"""The page of `opdlm trace`: template, style, script and data in one HTML file that loads nothing from outside.

All text that comes from a model or a prompt is JSON inside a script element that the browser does not run, and the
page's script inserts it as text, never as markup.
"""

from __future__ import annotations

import html
import json
from typing import Any

from opdlm.deploy.pages.build import build_page

_ESCAPES: dict[str, str | int | None] = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}
"""In JSON these characters occur only in strings, where an escape means the same. Escaped, they make no `</script>`."""


def render_page(record: dict[str, Any], title: str) -> str:
    """The page's HTML. `record`: data for JSON, from `run_trace`."""
    return build_page("opdlm.deploy.tools.trace", "trace", title=html.escape(title), data=embed_json(record))


def embed_json(record: dict[str, Any]) -> str:
    """JSON that is safe inside `<script type="application/json">`, and from which parsing gives the record back."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(str.maketrans(_ESCAPES))
