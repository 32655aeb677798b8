"""Converts tensors to numpy arrays, which Ray's object store shares without a copy, and back; finds broken values."""

from __future__ import annotations

import numpy as np
import torch


def tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    """Converts a tensor of any shape to an array on the CPU. A bfloat16 tensor gives uint16 numbers with its bits."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


def array_dtype(tensor: torch.Tensor) -> str:
    """Returns numpy's name of the dtype that `tensor_to_array` gives: `float32`, or `uint16` for bfloat16."""
    return "uint16" if tensor.dtype is torch.bfloat16 else str(tensor.dtype).removeprefix("torch.")


def array_to_tensor(array: np.ndarray) -> torch.Tensor:
    """Converts an array to a tensor on the CPU; uint16 numbers become bfloat16.

    The tensor is a copy, because the memory of Ray's object store is read-only.
    """
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if tensor.dtype is torch.uint16 else tensor


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A small array as a tensor on a device. The host does not wait for a GPU: it copies from page-locked memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape and dtype holds neither NaN nor infinity. Waits for the tensor's device."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    lowest, highest = torch.aminmax(tensor.detach())  # a NaN makes both NaN
    return bool(lowest.isfinite() & highest.isfinite())
