"""`opdlm trace`: commands about a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.config.schema import Strategy
from deploy.cli.app import app, clear_errors, out


@app.command()
def trace(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Prompt text; repeatable.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Held-out problems of the run's task, or first prompts of its data. Default: 3."),
    ] = None,
    student: Annotated[
        Path | None,
        typer.Option(help="Student folder. Default: RUN/student, else the newest checkpoint, else the start."),
    ] = None,
    strategy: Annotated[Strategy | None, typer.Option(help="Remasking strategy. Default: the run's.")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Threshold of low_confidence_dynamic. Default: the run's.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy. Default: the run's.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest response, in tokens. Default: the run's.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=50, help="Tokens shown of each model at each position.")] = 5,
    page: Annotated[Path | None, typer.Option("--out", help="The page. Default: RUN/trace.html.")] = None,
) -> None:
    """Write one HTML page that shows responses being unmasked: what student and teacher thought at each step.

    Without `--prompt` it shows samples; with it, samples only if `--samples` asks for them too.

    Examples:

        opdlm trace runs/demo

        opdlm trace runs/demo --prompt '47+8-3=' --strategy low_confidence_dynamic --temperature 0
    """
    with clear_errors():
        from deploy.trace_job import TraceOptions, run_trace

        options = TraceOptions(
            student, prompt or [], samples, strategy, threshold, temperature, max_new_tokens, top, page
        )
        run_trace(run, options, out)
