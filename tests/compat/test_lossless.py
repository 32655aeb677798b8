"""A lossless export decodes alike in transformers 4 and 5. `make test-compat`"""

from __future__ import annotations

import os

import pytest
import torch

from tests.common.export.test_lossless_export import ids, outside, read_outside, root

__all__ = ["ids", "outside", "root"]  # fixtures


@pytest.mark.skipif(
    "OPDLM_TRANSFORMERS_4" not in os.environ, reason="transformers 4 is not here; make test-compat installs it"
)
def test_version_4_writes_what_version_5_writes(root, ids, outside, tmp_path) -> None:
    """`outside` is compared with the teacher beside its fixture."""
    found = read_outside(root, ids, tmp_path, os.environ["OPDLM_TRANSFORMERS_4"])
    assert found.keys() == outside.keys()
    assert len(found) == 30
    for name, tensor in found.items():
        if not name.endswith("/sampled"):
            torch.testing.assert_close(tensor, outside[name], rtol=1e-4, atol=1e-4)
