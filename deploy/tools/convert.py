"""`opdlm convert`: a student, or the autoregressive model itself, from a folder, a GGUF file or a hub id."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from opdlm.common.config.base import DecodingOrder
from opdlm.common.errors import OpdlmError
from opdlm.common.files import check_new_folder, home_path
from opdlm.common.form import Context
from opdlm.common.grid import GridKind
from opdlm.common.model.convert import convert_checkpoint, write_teacher
from opdlm.common.model.facts import read_facts
from opdlm.common.model.gguf_convert import NumberFormat, convert_gguf
from opdlm.common.model.gguf_file import is_gguf
from opdlm.common.model.hub import model_folder
from opdlm.deploy.observe.meter import Meter

_BLOCK_SIZE, _BLOCK_GRID = 4, "absolute"


@dataclass(frozen=True, slots=True)
class StudentSettings:
    """What a student is made with; None is the default."""

    block_size: int | None
    block_grid: GridKind | None
    mask_token: str | None
    logit_shift: bool | None = None
    context: Context | None = None
    decoding_order: DecodingOrder | None = None

    def check(self) -> None:
        """Raises `OpdlmError` where the context does not go with the grid, before a large file is read."""
        if self.context == "causal" and (found := self.block_grid or _BLOCK_GRID) != "response":
            raise OpdlmError(f"--context: causal needs the block grid `response` (--block-grid); found `{found}`")

    def refuse(self) -> None:
        """Raises `OpdlmError` where one is given, for a command that makes no student."""
        named: dict[str, object] = {
            "--block-size": self.block_size,
            "--block-grid": self.block_grid,
            "--mask-token": self.mask_token,
        }
        named |= {"--logit-shift": self.logit_shift, "--context": self.context}
        named |= {"--decoding-order": self.decoding_order}
        if given := [option for option, value in named.items() if value is not None]:
            raise OpdlmError(f"convert: {given[0]} is for a student, and no folder for one is given; add it, as DST")


def run_convert(
    source: str,
    destination: Path | None,
    teacher: Path | None,
    student: StudentSettings,
    dtype: NumberFormat | None,
    console: Console,
) -> None:
    """Writes the student, the teacher, or both, and says what it wrote.

    Args:
        source: folder, GGUF file or hub id.
        destination: new folder of the student; None: no student.
        teacher: new folder of the autoregressive model; None: none.
        dtype: number format of a GGUF file's weights; None: bfloat16.

    Raises:
        OpdlmError: the source cannot be used, a folder exists, or an option does not go with the others.
    """
    if destination is None and teacher is None:
        raise OpdlmError("convert: no folder to write; give DST for a student, or --teacher DST for the model itself")
    if destination is None:
        student.refuse()
    student.check()
    for folder in (destination, teacher):
        if folder is not None:
            check_new_folder("convert", folder)
    if destination is not None and teacher is not None and destination.resolve() == teacher.resolve():
        raise OpdlmError(f"convert: DST and --teacher are both {destination}; give each a folder of its own")
    path = Path(home_path(source))
    if not is_gguf(path):
        _from_folder(source, destination, teacher, student, dtype, console)
    elif teacher is not None:
        _read_gguf(path, teacher, dtype, console)
        if destination is not None:
            _student(teacher, destination, student, console)
    elif destination is not None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".opdlm-", dir=destination.parent) as between:
            _read_gguf(path, Path(between, "teacher"), dtype, console, shown=False)
            _student(Path(between, "teacher"), destination, student, console)


def _from_folder(
    source: str,
    destination: Path | None,
    teacher: Path | None,
    student: StudentSettings,
    dtype: NumberFormat | None,
    console: Console,
) -> None:
    if Path(source).suffix.lower() == ".gguf" and not Path(home_path(source)).exists():
        raise OpdlmError(f"convert: {source} does not exist; expected a GGUF file")
    if dtype is not None:
        raise OpdlmError(f"--dtype: found {dtype}; it is for GGUF files: a folder's weights are copied as they are")
    folder = model_folder(source, "SRC")
    if teacher is not None:
        write_teacher(folder, teacher)
        console.print(f"{teacher}: the autoregressive model", highlight=False, soft_wrap=True)
    if destination is not None:
        _student(folder, destination, student, console)


def _student(source: Path, destination: Path, student: StudentSettings, console: Console) -> None:
    size, grid = student.block_size or _BLOCK_SIZE, student.block_grid or _BLOCK_GRID
    form = student.logit_shift, student.context
    mask_id = convert_checkpoint(source, destination, size, grid, student.mask_token, *form, student.decoding_order)
    if note := read_facts(source).end_tokens_note:
        print(f"opdlm: {note}", file=sys.stderr)
    facts = read_facts(destination)
    order = "" if facts.order == "confidence" else f", decoding order {facts.order}"
    line = f"{destination}: mask token id {mask_id}, block size {size}, {grid} grid, {facts.form}{order}"
    console.print(line, highlight=False, soft_wrap=True)


def _read_gguf(file: Path, folder: Path, dtype: NumberFormat | None, console: Console, shown: bool = True) -> None:
    number_format: NumberFormat = dtype or "bfloat16"
    begun = False
    with Meter(console, done_word="written") as meter:

        def progress(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                meter.begin(f"tensors of {file.name}", total)
                begun = True
            meter(done)

        convert_gguf(file, folder, number_format, progress)
    if shown:
        line = f"{folder}: the autoregressive model in {number_format}"
        console.print(line, highlight=False, soft_wrap=True)
