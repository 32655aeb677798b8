"""A safetensors file that is written tensor by tensor. `pytest tests/common/test_tensor_file.py`"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from opdlm.common.tensor_file import TensorFile


def test_the_library_reads_what_was_written_in_any_order(tmp_path) -> None:
    tensors = {"a": torch.randn(3, 5), "empty": torch.zeros(0, 4), "one": torch.tensor(2.5), "b": torch.randn(7).t()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with TensorFile(tmp_path / "t.safetensors", shapes, {"step": "12"}) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    with safe_open(tmp_path / "t.safetensors", "pt") as found:
        assert found.metadata() == {"format": "pt", "step": "12"}
        assert set(found.keys()) == set(tensors)
        assert all(torch.equal(found.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_that_was_not_announced_or_is_missing_is_an_error(tmp_path) -> None:
    def file() -> TensorFile:
        return TensorFile(tmp_path / "t.safetensors", {"a": (2, 3)}, {})

    with pytest.raises(ValueError, match=r"a: torch.float32 \(3, 2\); expected float32 \(2, 3\)"), file() as open_file:
        open_file.write("a", torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"a: torch.bfloat16"), file() as open_file:
        open_file.write("a", torch.zeros(2, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="1 tensors were not written, the first is a"), file():
        pass
