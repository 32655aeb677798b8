"""The checksum of tensors. `pytest tests/common/test_checksum.py`"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opdlm.common.checksum import checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def _by_hand(data: bytes) -> int:
    """The definition in plain Python, word by word."""
    words = np.frombuffer(data + bytes(-len(data) % 8), np.uint64).tolist()
    whole, running = len(data) // 8, 0
    blocks = [words[i : i + 65536] for i in range(0, whole, 65536)] if whole else []
    if blocks and len(blocks[-1]) + 65536 * (len(blocks) - 1) > whole:
        blocks[-1] = blocks[-1][: whole % 65536]
    blocks += [words[whole:]] if words[whole:] else []
    for block in blocks:
        total = sum(word * ((place * 0x9E3779B97F4A7C15) | 1) for place, word in enumerate(block, start=1))
        running = (running * 0x100000001B3 + total) % 2**64
    return running


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, 524_288, 600_001])
def test_the_checksum_follows_its_definition(size) -> None:
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    assert checksum(torch.from_numpy(data)) == _by_hand(data.tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_value_changes_the_checksum(dtype) -> None:
    tensor = (torch.randn(70_001) * 50).to(dtype)
    before = checksum(tensor)
    for place in (0, 1, 65_535, 65_536, 70_000):
        changed = tensor.clone()
        changed[place] += 1 if changed[place] < 100 else -1
        assert checksum(changed) != before


def test_the_order_of_values_and_of_tensors_matters() -> None:
    tensor = torch.arange(200_000, dtype=torch.float32)
    a, b = torch.randn(5), torch.randn(6)
    assert checksum(tensor.flip(0)) != checksum(tensor)
    assert checksum(torch.cat([tensor[131_072:], tensor[:131_072]])) != checksum(tensor)
    assert checksum(b, checksum(a)) != checksum(a, checksum(b))


def test_the_layout_in_memory_does_not_matter() -> None:
    tensor = torch.randn(30, 40)
    assert checksum(tensor.T.contiguous().T) == checksum(tensor)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_place_in_memory_does_not_matter(dtype) -> None:
    """ZeRO keeps the parameters as views into one flat buffer, where they begin anywhere."""
    flat = (torch.arange(40_000) % 113).to(dtype)
    for start in range(9):
        for size in (0, 1, 3, 7, 8, 1001, 33_333):
            view = flat[start : start + size]
            assert (
                checksum(view) == checksum(view.clone()) == _by_hand(view.clone().view(torch.uint8).numpy().tobytes())
            )


def test_tensors_of_every_shape_have_a_checksum() -> None:
    flat = torch.arange(600, dtype=torch.bfloat16)
    for tensor in (flat[3], flat[5:5], flat[1:].view(-1)[:598].view(2, 13, 23), flat[1::2], flat[7:27].view(4, 5).T):
        assert checksum(tensor) == checksum(tensor.clone(memory_format=torch.contiguous_format))
    assert checksum(flat[5:5], running=17) == 17
    assert checksum(flat[1].expand(3, 4)) == checksum(torch.ones(3, 4, dtype=torch.bfloat16))
