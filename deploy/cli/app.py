"""What all commands share: the app, the terminal, and how a user's mistake ends."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from opdlm.common.errors import OpdlmError

app = typer.Typer(
    help="Turn an autoregressive language model into a diffusion language model, on a Ray cluster.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)
out = Console()

CheckpointFolder = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder in Hugging Face layout.")]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file; see deploy/*.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting; repeatable.")
]

Chat = Annotated[bool, typer.Option("--chat", help="Put prompts through the tokenizer's chat template.")]
Thinking = Annotated[
    bool | None, typer.Option("--thinking/--no-thinking", help="The template's enable_thinking. Default: its own.")
]


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """A user's mistake, or a full disk, is printed as it is, without a traceback, and exits with 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        yield
    except OpdlmError as error:
        for line in str(error).splitlines():
            print(f"opdlm: {line}", file=sys.stderr)
        raise typer.Exit(2) from None
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(f"opdlm: {error.filename or 'a file'} cannot be written: {error.strerror}; make room", file=sys.stderr)
        raise typer.Exit(2) from None
