"""Works on a checkpoint's safetensors files without loading them: finds tensors, copies files, adds a row to a matrix.

A safetensors file has 8 bytes with the length of its header, a JSON header (`{name: {dtype, shape, data_offsets}}`),
and the bytes of the tensors (github.com/huggingface/safetensors). The library can write a file only from tensors in
memory. So a file that differs from another by one row is written here, from the bytes of the other file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from opdlm.common.errors import OpdlmError
from opdlm.common.model.adapters import NOISY_FILE, noisy_tensors
from opdlm.common.tensors import is_finite

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_COPY_BYTES = 1 << 24
_SAMPLE_BYTES = 1 << 12
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}  # other dtypes have 1 byte
_SETTINGS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files of a checkpoint besides config.json that decide what a model does."""
_FORMAT = {"format": "pt"}  # transformers refuses files without it


@dataclass(frozen=True, slots=True)
class Shards:
    """The weight files of a checkpoint folder, as their headers describe them."""

    folder: Path
    file_of: dict[str, str]
    """Tensor name -> file name."""
    headers: dict[str, dict[str, Any]]
    """File name -> tensor name -> `{dtype, shape, data_offsets}`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return tuple(self.headers[self.file_of[name]][name]["shape"])

    def load(self, name: str) -> torch.Tensor:
        """Loads one tensor, in the number format in which it is stored."""
        with safe_open(self.folder / self.file_of[name], "pt") as tensors:
            return tensors.get_tensor(name)


def read_shards(folder: str | Path) -> Shards:
    """Reads the headers of a checkpoint's files: one file, or those that `model.safetensors.index.json` names.

    Raises:
        OpdlmError: the folder has no safetensors files (the text says so if it has pickles), or a file is missing, cut
            short or of another kind.
    """
    folder = Path(folder)
    names: dict[str, str] = {}
    if (folder / INDEX_FILE).is_file():
        names = _read_index(folder / INDEX_FILE)
        files = sorted(set(names.values()))
    elif (folder / SINGLE_FILE).is_file():
        files = [SINGLE_FILE]
    else:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        found = f"only pickles ({', '.join(pickles[:3])}), which are not opened here" if pickles else "no weights"
        raise OpdlmError(f"model folder {folder}: {found}; expected {SINGLE_FILE} or {INDEX_FILE}")
    headers = {file: _read_header(folder / file) for file in files}
    file_of = {name: file for file, header in headers.items() for name in header}
    if lost := sorted(names.keys() - file_of.keys()):
        raise OpdlmError(f"model folder {folder}: {INDEX_FILE} names {lost[0]} in {names[lost[0]]}, which lacks it")
    return Shards(folder, file_of, headers)


def require_finite(tensor: torch.Tensor, name: str, folder: str | Path) -> None:
    """Refuses a tensor of a checkpoint that holds NaN or infinity, with which every answer would be nonsense.

    Raises:
        OpdlmError: it holds one; the tensor and the first place are named.
    """
    if not is_finite(tensor):
        broken = (~tensor.detach().isfinite()).nonzero()
        raise OpdlmError(
            f"model folder {folder}: {name} holds {len(broken)} of {tensor.numel()} values that are NaN or infinite, "
            f"the first at {broken[0].tolist()}; the file is damaged, or its training diverged: use another checkpoint"
        )


def check_finite(shards: Shards) -> None:
    """Reads every tensor of a checkpoint, adapters on noisy tokens too, and refuses NaN and infinity.

    One tensor is in memory at a time.

    Raises:
        OpdlmError: see `require_finite`; or the file of the adapters is damaged.
    """
    for name in sorted(shards.file_of):
        require_finite(shards.load(name), name, shards.folder)
    for name, tensor in noisy_tensors(shards.folder):
        require_finite(tensor, name, shards.folder)


def copy_shards(shards: Shards, destination: Path, rows: Mapping[str, torch.Tensor], drop: frozenset[str]) -> None:
    """Copies a checkpoint's weight files, adds rows to some tensors, and leaves others out.

    A file without a change is copied as it is. It is not hard-linked, because `save_pretrained` into either folder
    writes files in place and would change the weights of the other folder. No tensor is loaded.

    Args:
        destination: an existing folder.
        rows: tensor name -> the row `[D]` to append to it, in the tensor's own dtype.
        drop: names of tensors to leave out.
    """
    for file, header in shards.headers.items():
        if header.keys() & (rows.keys() | drop):
            _rewrite(shards.folder / file, destination / file, header, rows, drop)
        else:
            shutil.copyfile(shards.folder / file, destination / file)
    if (shards.folder / INDEX_FILE).is_file():
        kept = {name: file for name, file in sorted(shards.file_of.items()) if name not in drop}
        size = sum(_bytes(header[name]) for header in shards.headers.values() for name in header.keys() & kept.keys())
        index = {
            "metadata": {"total_size": size + sum(row.numel() * row.element_size() for row in rows.values())},
            "weight_map": kept,
        }
        (destination / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _read_index(file: Path) -> dict[str, str]:
    try:
        names: dict[str, str] = json.loads(file.read_text())["weight_map"]
        files = set(names.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OpdlmError(f"{file}: expected JSON with a weight_map; found {type(error).__name__}: {error}") from None
    if outside := sorted(name for name in files if Path(name).name != name):  # files of these names are written later
        raise OpdlmError(f"{file}: {outside[0]!r} is not the name of a file in its folder")
    if others := sorted(name for name in files if not name.endswith(".safetensors")):  # transformers unpickles them
        raise OpdlmError(f"{file}: names {others[0]!r}; expected .safetensors files only, pickles are not opened here")
    return names


def _read_header(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, "pt"):  # the library's own check of header and length
            pass
        with file.open("rb") as stream:
            header: dict[str, Any] = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    except Exception as error:  # SafetensorError is derived from Exception itself
        raise OpdlmError(f"model folder {file.parent}: {file.name} cannot be read: {error}") from None
    header.pop("__metadata__", None)
    return header


def _rewrite(
    source: Path, target: Path, header: dict[str, Any], rows: Mapping[str, torch.Tensor], drop: frozenset[str]
) -> None:
    # Tensors with the widest numbers come first, so each tensor starts at a multiple of the size of its numbers.
    names = sorted(
        header.keys() - drop,
        key=lambda n: (-_ITEM_BYTES.get(header[n]["dtype"], 1), header[n]["data_offsets"][0]),
    )
    new: dict[str, Any] = {"__metadata__": _FORMAT}
    end = 0
    for name in names:
        start, shape = end, list(header[name]["shape"])
        end += _bytes(header[name])
        if name in rows:
            shape[0] += 1
            end += rows[name].numel() * rows[name].element_size()
        new[name] = {"dtype": header[name]["dtype"], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(new, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as old, target.open("wb") as out:
        data = 8 + struct.unpack("<Q", old.read(8))[0]
        out.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            old.seek(data + header[name]["data_offsets"][0])
            _copy_bytes(old, out, _bytes(header[name]))
            if name in rows:
                out.write(rows[name].contiguous().view(torch.uint8).numpy().tobytes())


def _copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        chunk = source.read(min(count, _COPY_BYTES))
        if not chunk:
            raise OpdlmError(f"{source.name} ended {count} bytes early")
        target.write(chunk)
        count -= len(chunk)


def _bytes(entry: dict[str, Any]) -> int:
    return int(entry["data_offsets"][1] - entry["data_offsets"][0])


def weights_fingerprint(folder: str | Path) -> str:
    """Returns a fingerprint of config.json and of a few kilobytes of every tensor.

    It differs between two trainings of one model, and is computed without reading all weights.
    """
    shards = read_shards(folder)
    running = hashlib.sha256((shards.folder / "config.json").read_bytes())
    for file, header in sorted(shards.headers.items()):
        with (shards.folder / file).open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            for name in sorted(header):
                start, end = (8 + length + offset for offset in header[name]["data_offsets"])
                for place in (start, (start + end) // 2, max(end - _SAMPLE_BYTES, start)):
                    stream.seek(place)
                    running.update(stream.read(min(_SAMPLE_BYTES, end - place)))
    return running.hexdigest()[:16]


def model_fingerprint(folder: str | Path) -> str:
    """Returns a fingerprint of a folder: `weights_fingerprint`, adapters, tokenizer, template and end tokens."""
    running = hashlib.sha256(weights_fingerprint(folder).encode())
    for file in (Path(folder, name) for name in (NOISY_FILE, *_SETTINGS)):
        if file.is_file():
            running.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return running.hexdigest()[:16]
