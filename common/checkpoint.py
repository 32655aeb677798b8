"""Checkpoints that neither a crash at any byte nor a full disk can hurt: written aside, synced, checksummed, renamed.

    RUN/checkpoints/round-000040/
        weights.safetensors     float32 weights by parameter name
        optimizer.safetensors   `exp_avg.NAME`, `exp_avg_sq.NAME`
        state.json              round, step, weight version, cursor, ledger, curriculum, config digest
        manifest.json           size and CRC-32 of each file

Nothing in it is a pickle, and nothing depends on how many ranks wrote it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from opdlm.common.errors import OpdlmError
from opdlm.common.files import sync

log = logging.getLogger("opdlm.checkpoint")

_MANIFEST = "manifest.json"
_STAGING, _OLD = ".new-", ".old-"
"""Names of folders that are no checkpoints yet, or no more."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    folder: Path
    state: dict[str, Any]

    @property
    def rounds(self) -> int:
        """Rounds trained when it was written."""
        return int(self.state["rounds"])


def save_checkpoint(root: Path, state: dict[str, Any], write_files: Callable[[Path], None], keep: int) -> Path:
    """Writes one checkpoint, then removes the ones before it but for the newest `keep`, this one counted.

    No earlier checkpoint is touched before the new one is whole; one that cannot be removed then is left to the next
    save. Nobody else may be writing to `root`: what a writer that died left half done is removed first.

    Args:
        root: folder of the checkpoints.
        state: JSON-able; `rounds` names the checkpoint.
        write_files: writes the tensors into the folder it is given.

    Raises:
        OSError, SafetensorError: it could not be written (a full disk, say); the earlier ones are as they were.
    """
    final = root / _name(state["rounds"])
    staging = root / f"{_STAGING}{final.name}.{os.getpid()}"
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{_STAGING}*"):
        _remove(left)
    try:
        staging.mkdir()
        write_files(staging)
        (staging / "state.json").write_text(json.dumps(state, indent=1))
        manifest = {file.name: _fingerprint(file) for file in sorted(staging.iterdir())}
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in [*staging.iterdir(), staging]:
            sync(file)
        if final.exists():  # of an earlier life that went on from before it; by a rename, so that it goes at once
            final.rename(root / f"{_OLD}{final.name}.{os.getpid()}")
        staging.rename(final)
        sync(root)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    # Of rounds behind this one there are only damaged ones, that the run went back from: they do not count as kept.
    earlier = [folder for folder in list_checkpoints(root) if folder.name <= final.name]
    for unneeded in [*earlier[:-keep], *root.glob(f"{_OLD}*")]:
        _remove(unneeded)
    return final


def latest_checkpoint(root: Path, rounds: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named in the log and passed over.

    Args:
        rounds: leave out those of more rounds than this.

    Raises:
        OpdlmError: there are checkpoints, but none is whole (starting over in silence would lose the run).
    """
    folders = [f for f in list_checkpoints(root) if rounds is None or f.name <= _name(rounds)]
    for folder in reversed(folders):
        problem = damage(folder)
        if problem is None:
            return Checkpoint(folder, json.loads((folder / "state.json").read_text()))
        log.warning("checkpoint %s is damaged (%s); using the one before it", folder, problem)
    if folders:
        raise OpdlmError(f"no whole checkpoint among {len(folders)} in {root}; newest: {damage(folders[-1])}")
    return None


def _name(rounds: int) -> str:
    return f"round-{rounds:06d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in root.glob("round-*") if path.is_dir())


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        for name, expected in manifest.items():
            found = _fingerprint(folder / name)
            if found != expected:
                return f"{name} has {found['bytes']} bytes, CRC {found['crc32']}; expected {expected}"
            if name.endswith(".safetensors"):
                with safe_open(folder / name, "np"):  # its header; a checksum that fits says nothing of what it is
                    pass
        json.loads((folder / "state.json").read_text())
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s is not needed any more, but cannot be removed: %s", folder, error)


def _fingerprint(file: Path) -> dict[str, int]:
    crc, size = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}
