"""Writes a safetensors file one tensor at a time. The library itself writes only what is in memory as a whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from opdlm.common.tensors import tensor_to_array

_ITEM_BYTES = 4


class TensorFile:
    """A new safetensors file of float32 tensors, open for writing: a context manager.

    The format (also in `common/model/shards.py`): 8 bytes with the length of the header, a JSON header with each
    tensor's place, the numbers.

    Args:
        file: where to write; an existing file is replaced.
        shapes: of all tensors that will be written, by name.
        metadata: strings that the header holds beside them.

    Raises:
        OSError: the disk did not take it; here, in `write`, or when the block ends.
    """

    def __init__(self, file: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        self._places: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + torch.Size(shape).numel() * _ITEM_BYTES
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
            self._places[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._shapes, self._begin = dict(shapes), 8 + len(text)
        self._stream = file.open("wb")
        self._stream.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor, on any device, to its place. Each name is written once, in any order.

        Raises:
            ValueError: the tensor is not the one that the header announced.
        """
        if tensor.dtype is not torch.float32 or tuple(tensor.shape) != self._shapes[name]:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}; expected float32 {self._shapes[name]}")
        self._stream.seek(self._begin + self._places.pop(name))
        self._stream.write(tensor_to_array(tensor).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stream.close()
        if kind is None and self._places:
            raise ValueError(f"{len(self._places)} tensors were not written, the first is {next(iter(self._places))}")
