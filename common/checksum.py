"""A checksum of tensors that is computed on their own device: a tensor on a GPU is not copied to the host.

The bytes are read as 64-bit words. Each word is multiplied by an odd number that depends on its place, and the products
are summed modulo 2^64. Integer sums do not depend on their order, so every device gives the same number; a changed bit,
or two words that change places, give another one. The checksum finds accidents (a transfer that was cut, another number
format), not attacks.
"""

from __future__ import annotations

import functools

import torch

_WORD_BYTES = 8
_BLOCK = 1 << 16
"""Words that are multiplied in one call: 512 KiB, which fit into a core's cache."""
_STEP, _GOLDEN = 0x100000001B3, 0x9E3779B97F4A7C15
_MODULUS = 1 << 64


def checksum(tensor: torch.Tensor, running: int = 0) -> int:
    """Returns the 64-bit checksum of a tensor's bytes.

    Args:
        tensor: any shape, any dtype of whole bytes, any device.
        running: checksum of the tensors before this one; the result then covers all of them.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % _WORD_BYTES:  # a view into a flat buffer, say; torch reads words at whole words only
        data = data.clone()
    whole = data.numel() // _WORD_BYTES * _WORD_BYTES
    words = [data[:whole].view(torch.int64)] if whole else []
    if rest := data.numel() - whole:
        words.append(torch.nn.functional.pad(data[whole:], (0, _WORD_BYTES - rest)).view(torch.int64))
    factors = _factors(tensor.device)
    product = torch.empty_like(factors)
    sums = [
        torch.mul(block, factors[: len(block)], out=product[: len(block)]).sum()
        for part in words
        for block in part.split(_BLOCK)
    ]
    for value in torch.stack(sums).tolist() if sums else []:
        running = (running * _STEP + value) % _MODULUS
    return running


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    golden = _GOLDEN - _MODULUS  # int64 is signed: the same bits as _GOLDEN
    return torch.arange(1, _BLOCK + 1, device=device) * golden | 1
