"""Packs a model's weights for sending: one flat buffer per dtype, each parameter's place in it, and a checksum.

`load_weights` copies a pack into a model and then compares the checksum of the model's parameters with the pack's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from opdlm.common.checksum import checksum
from opdlm.common.model.adapters import adapter_parameters, has_noisy_adapters
from opdlm.common.tensors import array_dtype, array_to_tensor, is_finite, tensor_to_array
from opdlm.common.types import TensorPlace, WeightPack


class WeightPacker:
    """Packs the weights of one model, version after version, into the same host memory.

    The memory is used again because writing to fresh memory takes longer than the copy itself. So a pack is valid only
    until the next one is made.

    Args:
        on_device: pack into tensors on the weights' own device, new ones for each version, because actors read them at
            any later time. Such a pack stays valid.
    """

    def __init__(self, on_device: bool = False) -> None:
        self._on_device = on_device
        self._buffers: dict[str, torch.Tensor] = {}
        self._device = torch.device("cpu")

    def pack(self, version: int, named: Iterable[tuple[str, torch.Tensor]]) -> WeightPack:
        """Packs the parameters in the given order.

        Args:
            named: (name, parameter) pairs; a generator may gather the parameters one by one.

        Raises:
            ValueError: names, shapes or dtypes need other buffers than those of the version before.
        """
        places: list[TensorPlace] = []
        pieces: dict[str, list[torch.Tensor]] = {}
        used: dict[str, int] = {}
        total = 0
        buffers = self._buffers
        if self._on_device:
            buffers = {kind: torch.empty_like(buffer, device=self._device) for kind, buffer in buffers.items()}
        for name, tensor in named:
            total = checksum(tensor, total)
            kind, start = array_dtype(tensor), used.get(array_dtype(tensor), 0)
            used[kind] = start + tensor.numel()
            places.append(TensorPlace(name, tuple(tensor.shape), kind, start))
            flat = tensor.detach().flatten()
            if kind in buffers:
                buffers[kind][start : used[kind]].copy_(flat)
            else:
                self._device = flat.device
                pieces.setdefault(kind, []).append(flat.clone() if self._on_device else flat.cpu().clone())
        buffers |= {kind: _joined(parts) for kind, parts in pieces.items()}
        if used != {kind: buffer.numel() for kind, buffer in buffers.items()}:
            raise ValueError(f"weights version {version}: not the parameters that were packed before")
        if self._on_device:
            self._buffers = {kind: buffer.to("meta") for kind, buffer in buffers.items()}  # sizes, no memory
            return WeightPack(version, tuple(places), buffers, total)
        return WeightPack(version, tuple(places), {k: tensor_to_array(b) for k, b in buffers.items()}, total)


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Concatenates tensors and frees each once it is copied, so the host never holds all weights twice."""
    joined = torch.empty(sum(piece.numel() for piece in pieces), dtype=pieces[0].dtype, device=pieces[0].device)
    start = 0
    for place, piece in enumerate(pieces):
        joined[start : start + piece.numel()] = piece
        start += piece.numel()
        pieces[place] = piece.new_empty(0)
        del piece
    return joined


@torch.no_grad()
def load_weights(model: nn.Module, pack: WeightPack) -> None:
    """Copies a pack into a model and checks the model's parameters against the pack's checksum.

    The parameters of a model with adapters on noisy tokens alone are those adapters; nothing else is trained.

    Raises:
        ValueError: names or shapes differ, a weight is NaN or infinite, or the checksum of the loaded parameters is not
            the pack's.
    """
    parameters = dict(adapter_parameters(model) if has_noisy_adapters(model) else model.named_parameters())
    if differing := set(parameters) ^ {place.name for place in pack.places}:
        raise ValueError(f"weights version {pack.version}: model and pack differ in {sorted(differing)[:3]}")
    total = 0
    for place, values in _unpack(pack):
        parameter = parameters[place.name]
        if tuple(parameter.shape) != place.shape:
            raise ValueError(f"weights version {pack.version}: {place.name} is {place.shape}, not {parameter.shape}")
        _fill(parameter, values)
        if not is_finite(parameter):
            raise ValueError(f"weights version {pack.version}: {place.name} holds NaN or infinity")
        total = checksum(parameter, total)
    if total != pack.checksum:
        raise ValueError(
            f"weights version {pack.version}: checksum {total:#018x} after loading, {pack.checksum:#018x} when "
            "packed; the transfer was damaged, or the model's number format is not the learner's"
        )


def _fill(parameter: nn.Parameter, values: np.ndarray | torch.Tensor) -> None:
    """Copies values into a parameter; a parameter on the CPU is filled straight from the object store's memory."""
    if isinstance(values, torch.Tensor):
        parameter.copy_(values)
    elif parameter.is_cpu and parameter.is_contiguous() and (own := tensor_to_array(parameter)).dtype == values.dtype:
        np.copyto(own, values)
    else:
        parameter.copy_(array_to_tensor(values))


def _unpack(pack: WeightPack) -> Iterator[tuple[TensorPlace, np.ndarray | torch.Tensor]]:
    for place in pack.places:
        size = int(np.prod(place.shape, dtype=np.int64))
        yield place, pack.buffers[place.dtype][place.start : place.start + size].reshape(place.shape)
