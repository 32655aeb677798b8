"""Template, style and script -> one HTML file that loads nothing from outside.

`templates/look.css` and `templates/look.js` come before each page's own style and script.
"""

from __future__ import annotations

import re
from importlib.resources import files


def build_page(package: str, name: str, **parts: str) -> str:
    """The HTML of a page.

    Args:
        package: its folder `templates` has `NAME.html`, `NAME.css` and `NAME.js`.
        name: NAME.
        parts: HTML that takes the place of `{{PART}}` in the template, beside `style` and `script`.
    """
    shared, own = files("opdlm.deploy.pages") / "templates", files(package) / "templates"
    for part, kind in (("style", "css"), ("script", "js")):
        look, rest = shared / f"look.{kind}", own / f"{name}.{kind}"
        parts[part] = look.read_text(encoding="utf-8") + rest.read_text(encoding="utf-8")
    template = (own / f"{name}.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
