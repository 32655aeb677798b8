"""Files: JSON and YAML read as data only; files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opdlm.common.errors import OpdlmError
from opdlm.common.plain_yaml import parse_yaml


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OpdlmError: the file is not JSON (a pickle, say), or holds no object.
    """
    text = read_text(file)
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OpdlmError(f"{file} is not JSON: {error}") from None
    if not isinstance(held, dict):
        raise OpdlmError(f"{file} holds a {type(held).__name__}; expected an object")
    return held


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file; tags that would build Python objects are refused.

    Raises:
        OpdlmError: the file is not plain YAML, has a key twice, or holds no mapping.
    """
    text = read_text(file)
    try:
        held = parse_yaml(text)
    except OpdlmError as error:
        raise OpdlmError(f"{file} is not YAML: {error}") from None
    if held is None:
        return {}
    if not isinstance(held, dict):
        raise OpdlmError(f"{file} holds a {type(held).__name__}; expected sections such as `model:`")
    return held


def home_path(path: str) -> str:
    """The path with a leading `~` or `~user` replaced by that home folder.

    Raises:
        OpdlmError: there is no such user.
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        user = whole.partition("/")[0]
        raise OpdlmError(f"{path}: there is no home folder {user}; write ./{path} for a folder of that name")
    return whole


def read_text(file: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        OpdlmError: it cannot be read, or it is no text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise OpdlmError(f"{file} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise OpdlmError(f"{file} is not text: {error}") from None


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to: synced and renamed to `file` when the block ends, removed on an error.

    Readers see the old content or the new one, never a part. The folder must exist. The file gets the permissions of
    any new file there, whatever the writer gave it (`follow_umask`).
    """
    staging = _staging(file)
    try:
        yield staging
        follow_umask(staging)
        sync(staging)
        staging.replace(file)
    finally:
        staging.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Writes a whole text file with `atomic_file`."""
    with atomic_file(file) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Any, **how: Any) -> None:
    """Writes a whole JSON file with `atomic_file`. `how`: as in `json.dumps`."""
    write_text(file, json.dumps(content, indent=2, **how) + "\n")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder, whose parents are made; the folder itself must not exist."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = _staging(folder)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        follow_umask(*staging.rglob("*"))
        for path in (*staging.rglob("*"), staging):
            sync(path)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def follow_umask(*paths: Path) -> None:
    """Gives files the permissions that a new file beside the first one gets: the umask's, or the folder's default ACL.

    safetensors writes into a temporary file that its owner alone can read, and a copied file may keep the mode of its
    source. Folders and links are left out. The umask itself cannot be read without changing it for all threads.
    """
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    if not files:
        return
    probe = files[0].with_name(f".mode.{os.getpid()}.{threading.get_ident()}")
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()
    for file in files:
        if file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)


def check_new_folder(command: str, destination: Path) -> None:
    """Raises `OpdlmError` where the destination of a command exists, or where `atomic_folder` could not write it."""
    if os.path.lexists(destination):
        raise OpdlmError(f"{command}: {destination} exists; give a new folder (nothing was written)")
    _try_to_write(destination.parent, _staging(destination).name, destination, command)


def check_folder(folder: Path, what: str) -> None:
    """Checks that files can be made in a folder, which may not exist yet. Leaves nothing behind.

    Args:
        what: setting or option that names the folder, for the error.

    Raises:
        OpdlmError: they cannot be made.
    """
    _try_to_write(folder, ".opdlm", folder, what)


def check_file(file: Path, what: str) -> None:
    """The same for a file that `atomic_file` writes; its parents may be missing."""
    if os.path.isdir(file):
        raise OpdlmError(f"{what}: {file} is a folder; give a file")
    _try_to_write(file.parent, _staging(file).name, file, what)


def _try_to_write(folder: Path, name: str, shown: Path, what: str) -> None:
    """Makes an empty file `name` as in `folder`, but with missing folders below a temporary one.

    So nothing that another process could see or use appears and goes away again. Permissions, read-only disks, names
    that are too long, links that lead nowhere: only a trial finds them all.
    """
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        if not os.path.isdir(existing):
            raise NotADirectoryError(0, f"{existing} is not a folder")
        with tempfile.TemporaryDirectory(prefix=".opdlm-", dir=existing) as trial:
            inside = Path(trial, folder.relative_to(existing))
            inside.mkdir(parents=True, exist_ok=True)
            (inside / name).touch()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise OpdlmError(f"{what}: {shown} cannot be written: {reason}; give a place that can be written") from None


def sync(path: Path) -> None:
    """Waits until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
