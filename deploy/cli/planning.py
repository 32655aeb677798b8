"""`opdlm plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opdlm.deploy.cli.app import Overrides, RunFile, app, clear_errors, out


@app.command()
def plan(
    run: RunFile,
    override: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the same figures as JSON.")
    ] = None,
) -> None:
    """Print what a run will do, who gets which CPUs and GPUs, and the memory of each role with its arithmetic.

    Starts nothing and loads no weights: parameters are counted in the headers of the weight files.

    Examples:

        opdlm plan deploy/demo.yaml

        opdlm plan deploy/qwen3-8b.yaml --set rollout.actors=4 --json plan.json
    """
    with clear_errors():
        from opdlm.common.config import load_config
        from opdlm.deploy.run.plan import show_plan

        show_plan(load_config(run, override or []), out, json_file)
