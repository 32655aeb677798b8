"""Checkpoints that neither a crash at any byte nor a full disk can damage.

A checkpoint is written into a temporary folder, with checksums, synced to the disk, and then renamed.

    RUN/checkpoints/round-000040/
        weights.safetensors     float32 weights by parameter name
        optimizer.safetensors   AdamW's moments as `exp_avg.NAME`, `exp_avg_sq.NAME`
        state.json              rounds, optimizer steps, rollout tokens, weight version, next sample, seed,
                                torch's random state, fingerprints of config and data
        manifest.json           size and CRC-32 of each file

No file is a pickle, and no file depends on the number of ranks that trained.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from opdlm.common.errors import OpdlmError
from opdlm.common.files import follow_umask, sync

if TYPE_CHECKING:
    import torch

log = logging.getLogger("opdlm.checkpoint")

_MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
"""The file of the trained parameters."""
_STAGING, _OLD = ".new-", ".old-"
"""How the names begin of folders that are not checkpoints yet, or no longer."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files all fit their checksums."""

    folder: Path
    state: dict[str, Any]

    @property
    def rounds(self) -> int:
        """Number of rounds that had been trained when it was written."""
        return int(self.state["rounds"])


def save_checkpoint(root: Path, state: dict[str, Any], write_files: Callable[[Path], None], keep: int) -> Path:
    """Writes one checkpoint and returns its folder. Then removes old ones, so that the newest `keep` remain.

    No earlier checkpoint is changed before the new one is whole. If an old one cannot be removed, the next save tries
    again. Only one process may write to `root` at a time: what an earlier writer left half written is removed first.

    Args:
        root: folder of the checkpoints.
        state: what JSON can hold; `state["rounds"]` names the checkpoint.
        write_files: writes the tensors into the folder that it is given.
        keep: number of checkpoints to keep, with the new one.

    Raises:
        OSError, SafetensorError: the checkpoint could not be written, as on a full disk; earlier ones are unchanged.
    """
    final = root / _name(state["rounds"])
    staging = root / f"{_STAGING}{final.name}.{os.getpid()}"
    root.mkdir(parents=True, exist_ok=True)
    for half_written in root.glob(f"{_STAGING}*"):
        _remove(half_written)
    try:
        staging.mkdir()
        write_files(staging)
        (staging / "state.json").write_text(json.dumps(state, indent=1))
        manifest = {file.name: _fingerprint(file) for file in sorted(staging.iterdir())}
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        follow_umask(*staging.iterdir())
        for file in [*staging.iterdir(), staging]:
            sync(file)
        if final.exists():  # the run went back to before this round; a rename removes the old folder in one step
            final.rename(root / f"{_OLD}{final.name}.{os.getpid()}")
        staging.rename(final)
        sync(root)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    # Checkpoints of later rounds are damaged, or the run would not have gone back to this one: they are not counted.
    earlier = [folder for folder in list_checkpoints(root) if folder.name <= final.name]
    for unneeded in [*earlier[:-keep], *root.glob(f"{_OLD}*")]:
        _remove(unneeded)
    return final


def latest_checkpoint(root: Path, rounds: int | None = None) -> Checkpoint | None:
    """Returns the newest whole checkpoint, or None where there is no checkpoint. The log names damaged ones.

    Args:
        rounds: consider only checkpoints of at most this number of rounds.

    Raises:
        OpdlmError: there are checkpoints, but none is whole. Starting over without a word would lose the run's work.
    """
    folders = [f for f in list_checkpoints(root) if rounds is None or f.name <= _name(rounds)]
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(folders):
        problem = damage(folder)
        if problem is None:
            for newer, why in damaged:
                log.warning("checkpoint %s is damaged (%s); using %s", newer, why, folder.name)
            return Checkpoint(folder, json.loads((folder / "state.json").read_text()))
        damaged.append((folder, problem))
    if damaged:
        raise OpdlmError(
            f"no whole checkpoint among {len(damaged)} in {root}; the newest: {damaged[0][1]}; restore one from a "
            "backup, or start in another run.dir"
        )
    return None


def read_checkpoint(root: Path, rounds: int) -> Checkpoint:
    """The checkpoint of so many rounds, which another process has just found whole."""
    folder = root / _name(rounds)
    return Checkpoint(folder, json.loads((folder / "state.json").read_text()))


def weights_mark(folder: Path) -> str | None:
    """What tells a checkpoint's weights from others: the checksum that its manifest names. Reads no tensor.

    Returns: None where the folder is gone, or its manifest cannot be read.
    """
    try:
        return f"{json.loads((folder / _MANIFEST).read_text())[WEIGHTS]['crc32']:08x}"
    except (OSError, ValueError, LookupError, TypeError):
        return None


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 weight) of each trained parameter, one in memory at a time. Another process may still train.

    Raises:
        OpdlmError: the file of the weights is gone, or its checksum is not the one that the manifest names.
    """
    file = folder / WEIGHTS
    try:
        expected, found = json.loads((folder / _MANIFEST).read_text())[WEIGHTS], _fingerprint(file)
        if found != expected:
            raise OpdlmError(f"{file}: found {found}; expected {expected}, as {_MANIFEST} says; the file is damaged")
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                yield name, tensors.get_tensor(name)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise OpdlmError(f"checkpoint {folder} cannot be read: {type(error).__name__}: {error}") from None


def _name(rounds: int) -> str:
    return f"round-{rounds:06d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Returns the checkpoint folders, oldest first, whole or not."""
    return sorted(path for path in root.glob("round-*") if path.is_dir())


def damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None where it is whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        unnamed = {file.name for file in folder.iterdir()} - manifest.keys() - {_MANIFEST}
        if "state.json" not in manifest or unnamed:
            return f"{_MANIFEST} does not name {', '.join(sorted(unnamed)) or 'state.json'}"
        for name, expected in manifest.items():
            found = _fingerprint(folder / name)
            if found != expected:
                return f"{name} has {found['bytes']} bytes, CRC {found['crc32']}; expected {expected}"
            if name.endswith(".safetensors"):
                with safe_open(folder / name, "np"):  # reads the header, in case another kind of file was written
                    pass
        rounds = json.loads((folder / "state.json").read_text())["rounds"]
        if folder.name != _name(rounds):
            return f"state.json is of {_name(rounds)}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s is no longer needed, but cannot be removed: %s", folder, error)


def _fingerprint(file: Path) -> dict[str, int]:
    crc, size = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}
