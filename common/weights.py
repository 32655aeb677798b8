"""Weights on the wire: one flat buffer per dtype, a manifest, and a checksum that is checked after loading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from common.checksum import checksum
from common.tensors import array_dtype, array_to_tensor, tensor_to_array
from common.types import TensorPlace, WeightPack


class WeightPacker:
    """Packs the weights of one model, version after version, into the same memory.

    Memory that is touched for the first time costs more than the copy into it. A pack is good until the next one.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def pack(self, version: int, named: Iterable[tuple[str, torch.Tensor]]) -> WeightPack:
        """Packs parameters, in the order given, which may be a generator that gathers them one by one."""
        places: list[TensorPlace] = []
        pieces: dict[str, list[np.ndarray]] = {}
        used: dict[str, int] = {}
        total = 0
        for name, tensor in named:
            total = checksum(tensor, total)
            kind, start = array_dtype(tensor), used.get(array_dtype(tensor), 0)
            used[kind] = start + tensor.numel()
            places.append(TensorPlace(name, tuple(tensor.shape), kind, start))
            if kind in self._buffers:
                place = torch.from_numpy(self._buffers[kind][start : used[kind]])
                place.view(tensor.dtype).copy_(tensor.detach().flatten())
            else:
                pieces.setdefault(kind, []).append(tensor_to_array(tensor).reshape(-1))
        self._buffers |= {kind: np.concatenate(parts) for kind, parts in pieces.items()}
        if used != {kind: buffer.size for kind, buffer in self._buffers.items()}:
            raise ValueError(f"weights version {version}: not the parameters that were packed before")
        return WeightPack(version, tuple(places), dict(self._buffers), total)


@torch.no_grad()
def load_weights(model: nn.Module, pack: WeightPack) -> None:
    """Copies a pack into a model and checks what the model then holds.

    Raises:
        ValueError: names or shapes differ, or the checksum of the loaded parameters is not the pack's.
    """
    parameters = dict(model.named_parameters())
    if missing := set(parameters) ^ {place.name for place in pack.places}:
        raise ValueError(f"weights version {pack.version}: model and pack differ in {sorted(missing)[:3]}")
    total = 0
    for place, array in _unpack(pack):
        parameter = parameters[place.name]
        if tuple(parameter.shape) != place.shape:
            raise ValueError(f"weights version {pack.version}: {place.name} is {place.shape}, not {parameter.shape}")
        _fill(parameter, array)
        total = checksum(parameter, total)
    if total != pack.checksum:
        raise ValueError(
            f"weights version {pack.version}: checksum {total:#018x} after loading, {pack.checksum:#018x} when "
            "packed; the transfer was damaged or the model's number format differs from the learner's"
        )


def _fill(parameter: nn.Parameter, array: np.ndarray) -> None:
    """Straight from the object store's memory where both are in this machine's."""
    if parameter.is_cpu and parameter.is_contiguous() and (own := tensor_to_array(parameter)).dtype == array.dtype:
        np.copyto(own, array)
    else:
        parameter.copy_(array_to_tensor(array))


def _unpack(pack: WeightPack) -> Iterator[tuple[TensorPlace, np.ndarray]]:
    for place in pack.places:
        size = int(np.prod(place.shape, dtype=np.int64))
        yield place, pack.buffers[place.dtype][place.start : place.start + size].reshape(place.shape)
