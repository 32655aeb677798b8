"""`opdlm trace`, `curves`, `scale`: commands about a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opdlm.deploy.cli.app import app, clear_errors, out
from opdlm.deploy.evaluate.options import UsualStrategy


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
    strategy: UsualStrategy = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Threshold of the dynamic strategies. Default: the run's.")
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

        opdlm trace runs/demo --prompt '47+8-3=' --strategy low_confidence_static --temperature 0
    """
    with clear_errors():
        from opdlm.deploy.tools.trace.command import TraceOptions, run_trace

        options = TraceOptions(
            student, prompt or [], samples, strategy, threshold, temperature, max_new_tokens, top, page
        )
        run_trace(run, options, out)


@app.command()
def curves(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    picture: Annotated[Path, typer.Option("--out", help="PNG; the points go beside it as JSON.")] = Path("curves.png"),
    score_mark: Annotated[
        float | None, typer.Option(min=0, help="Draw a line at this share of the teacher's score.")
    ] = None,
    speed_mark: Annotated[
        float | None, typer.Option(min=0, help="Draw a line at this number of tokens per denoising step.")
    ] = None,
) -> None:
    """Draw what runs have learned over response tokens: share of the teacher's score, tokens per step, held-out KL.

    The figures are those of the runs' evaluations on `evaluation.data`; runs that go on can be drawn as well.

    Examples:

        opdlm curves runs/mine

        opdlm curves runs/opd runs/cft runs/off_policy_kd --score-mark 0.95 --speed-mark 1.9 --out compared.png
    """
    with clear_errors():
        from opdlm.common.errors import OpdlmError
        from opdlm.deploy.evaluate.commands import check_output
        from opdlm.deploy.observe.curves import write_curves

        if picture.suffix != ".png":
            raise OpdlmError(f"--out: found {picture}; expected a .png (the .json goes beside it)")
        for file in (picture, picture.with_suffix(".json")):
            check_output(file, "--out")
        marks = {"of_teacher": score_mark, "tokens_per_step": speed_mark}
        out.print(write_curves(runs, picture, {name: mark for name, mark in marks.items() if mark is not None}))
        out.print(f"written: {picture}, {picture.with_suffix('.json').name}", highlight=False, soft_wrap=True)


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a running run.")],
    rollout: Annotated[int | None, typer.Option(help="Rollout actors from now on.")] = None,
    teacher: Annotated[int | None, typer.Option(help="Teacher actors from now on.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for the run's answer.")] = 600.0,
) -> None:
    """Add rollout or teacher actors to a run, or take some away, without stopping it.

    New ones serve as soon as their model is loaded; those that go finish the call they are busy with. The numbers hold
    until the run ends; a resumed run has those of its run file. Learner workers need a resume: `opdlm train RUN.yaml
    --resume --set learner.workers=N`.

    A local Ray has room for the actors that the run began with; give it more with `--set resources.local_cpus=12`.

    Example:

        opdlm scale runs/mine --rollout 3 --teacher 2
    """
    with clear_errors():
        from opdlm.deploy.cluster.scaling import request_scale

        wanted = {role: count for role, count in (("rollout", rollout), ("teacher", teacher)) if count is not None}
        for role, (before, after) in request_scale(run, wanted, timeout).items():
            out.print(f"{role} actors: {before} → {after}", highlight=False)
