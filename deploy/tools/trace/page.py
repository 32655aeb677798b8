"""The page of `opdlm trace`: template, style, script and data in one HTML file that asks for nothing from outside.

Everything that a model or a prompt can choose travels as JSON inside a script element that the browser does not run,
and the script puts it on the page as text, never as markup.
"""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from typing import Any

_ESCAPES: dict[str, str | int | None] = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}
"""Inside JSON these stand in strings only, where an escape means the same; `</script>` and `<!--` cannot arise."""


def render_page(record: dict[str, Any], title: str) -> str:
    """The page as text. `record`: JSON-able, as `deploy/tools/trace/command.py` makes it."""
    templates = files("opdlm.deploy.tools.trace") / "templates"
    parts = {
        "title": html.escape(title),
        "style": (templates / "trace.css").read_text(encoding="utf-8"),
        "script": (templates / "trace.js").read_text(encoding="utf-8"),
        "data": embed_json(record),
    }
    page = (templates / "trace.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)


def embed_json(record: dict[str, Any]) -> str:
    """JSON that is safe inside `<script type="application/json">`; parsing it gives the record back."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(str.maketrans(_ESCAPES))
