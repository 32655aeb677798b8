"""The command `opdlm`. A module of its own, so that it can say which other `opdlm` comes first on Python's path."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Runs the command line."""
    found = find_spec("opdlm")  # finds it without running it
    folders = list(found.submodule_search_locations or []) if found else []
    if not any((Path(folder) / "deploy" / "cli").is_dir() for folder in folders):
        where = found.origin or folders[0] if found else "nothing"
        print(
            f"opdlm: {where} is in the way: Python finds it under the name opdlm, before the installed package; rename "
            "it, or take its folder off PYTHONPATH",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        from opdlm.deploy.cli import app

        app()
    except KeyboardInterrupt:  # before a command has begun, which says it by itself
        sys.exit(130)
