"""Tensors as the arrays that travel, and back."""

from __future__ import annotations

import numpy as np
import torch


def tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    """A CPU array of the tensor; bfloat16 as the uint16 of its bits, which `array_to_tensor` undoes."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


def array_dtype(tensor: torch.Tensor) -> str:
    """Numpy's name of the number format that `tensor_to_array` gives."""
    return "uint16" if tensor.dtype is torch.bfloat16 else str(tensor.dtype).removeprefix("torch.")


def array_to_tensor(array: np.ndarray) -> torch.Tensor:
    """A copy of the array as a tensor (the object store's memory is read-only); uint16 becomes bfloat16."""
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if tensor.dtype is torch.uint16 else tensor
