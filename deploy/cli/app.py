"""What all commands share: the app, the terminal, groups of options, and how a user's mistake ends."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import inspect
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

import opdlm
from opdlm.common.errors import OpdlmError
from opdlm.common.files import home_path
from opdlm.deploy.cluster.openmp import OPENMP_WAITS
from opdlm.deploy.run.recipes import find_run_file


class CheckedTyper(typer.Typer):
    """A typer app whose commands expand `~` in paths (no shell does in `--out=~/x`) and refuse nan and infinity."""

    def command(self, *args: Any, **settings: Any) -> Any:
        """See `typer.Typer.command`."""
        register = super().command(*args, **settings)

        def decorate(function: Callable[..., None]) -> Callable[..., None]:
            @functools.wraps(function)
            def checked(**given: Any) -> None:
                with clear_errors():
                    given = {name: _checked(name, value) for name, value in given.items()}
                function(**given)

            register(checked)
            return function

        return decorate


def _checked(name: str, value: Any) -> Any:
    """An argument as its command gets it."""
    if isinstance(value, Path):
        return Path(home_path(str(value)))
    if isinstance(value, float) and not math.isfinite(value):
        raise OpdlmError(f"--{name.replace('_', '-')}: found {value}; expected a finite number")
    return value


app = CheckedTyper(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)
out = Console()

CheckpointFolder = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="Checkpoint folder in Hugging Face layout, or a hub id such as Qwen/Qwen3-0.6B.",
        callback=lambda given: model_folder_of(given, "CKPT"),
    ),
]
RunFile = Annotated[
    Path,
    typer.Argument(
        metavar="RUN.yaml",
        help="Run file, or the name of a bundled one; `opdlm recipes` lists them.",
        callback=lambda given: _run_file(given),
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting; repeatable.")
]

LARGEST_SEED = 2**64 - 1
_HUB_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
_BARS_GIVEN = os.environ.get(_HUB_BARS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"opdlm {opdlm.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Turn an autoregressive language model into a diffusion language model, on a Ray cluster."""


def _run_file(given: Path) -> Path:
    with clear_errors():
        return find_run_file(Path(home_path(str(given))))


def model_folder_of(given: Path, name: str) -> Path:
    """The folder of a model that is given as a folder or a hub id; exits with one line where there is none.

    Args:
        name: the argument, for the line.
    """
    with clear_errors():
        from opdlm.common.model.hub import model_folder

        return model_folder(given, name)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """A user's mistake, a full disk and Ctrl-C are printed as one line, without a traceback; exits with 2, and 130."""
    os.environ.setdefault(_HUB_BARS, "1")
    for name, value in OPENMP_WAITS.items():
        os.environ.setdefault(name, value)  # before torch is loaded
    try:
        yield
    except KeyboardInterrupt as stopped:
        code = getattr(stopped, "code", 128 + signal.SIGINT)
        print(f"opdlm: {str(stopped) or 'Ctrl-C: ended at once'}", file=sys.stderr)
        if "ray" in sys.modules:
            from opdlm.deploy.cluster.process_end import end_now

            end_now(code)
        raise typer.Exit(code) from None
    except OpdlmError as error:
        for line in str(getattr(error, "cause", error)).splitlines():  # an actor's error has the traceback as its text
            print(f"opdlm: {line}", file=sys.stderr)
        if "ray" in sys.modules:
            from opdlm.deploy.run.stop import end_a_hanging_learner

            end_a_hanging_learner(2)
        raise typer.Exit(2) from None
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(f"opdlm: {error.filename or 'a file'} cannot be written: {error.strerror}; make room", file=sys.stderr)
        raise typer.Exit(2) from None


def show_hub_bars() -> None:
    """Lets the hub's library show its progress bars on a terminal; call it before that library is imported."""
    if _BARS_GIVEN is None and sys.stderr.isatty():
        os.environ[_HUB_BARS] = "0"


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Lets several commands share options: a parameter whose type is a dataclass stands for one option per field.

    The fields carry `typer.Option` in their annotations, and defaults. The command gets the dataclass.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))
            continue
        group = groups[parameter.name]
        of_fields = get_type_hints(group, include_extras=True)
        parameters += [
            parameter.replace(
                name=field.name, kind=parameter.KEYWORD_ONLY, default=field.default, annotation=of_fields[field.name]
            )
            for field in dataclasses.fields(group)
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        built = {
            name: group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**given, **built)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
