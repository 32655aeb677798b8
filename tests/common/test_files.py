"""The permissions of what we write. `pytest tests/common/test_files.py`"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opdlm.common.checkpoint import save_checkpoint
from opdlm.common.data.prompts import Prompt
from opdlm.common.export import export
from opdlm.common.files import write_json
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.folder import save_model
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.run import given_responses
from opdlm.deploy.run.given_responses import Recipe
from tests.tiny import save_teacher

MODES = {0o022: 0o644, 0o027: 0o640, 0o002: 0o664, 0o077: 0o600}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _modes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): oct(p.stat().st_mode & 0o777) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mask", MODES, ids=oct)
def test_files_follow_the_umask(tmp_path, mask) -> None:
    private = save_teacher(tmp_path / "teacher")
    for file in private.iterdir():
        file.chmod(0o600)
    written = tmp_path / "written"
    with umask(mask):
        written.mkdir()
        convert_checkpoint(private, written / "student", 4, "absolute")
        export(written / "student", written / "a2d", "a2d-qwen3", None)
        save_model(load_model(private), load_tokenizer(private), written / "model", [1])
        write_json(written / "report.json", {})

        def write(folder: Path) -> None:
            save_file({"w": torch.zeros(2)}, folder / "weights.safetensors")

        save_checkpoint(written / "checkpoints", {"rounds": 1}, write, keep=1)
        recipe, prompts = Recipe("t", "p", [1], 9, 0.0, 0, "float32"), [Prompt("a", np.array([1], np.int32))]
        given_responses._write(written / "r.parquet", prompts, [np.array([2], np.int32)], recipe)
    found = _modes(written)
    assert {"student/model.safetensors", "checkpoints/round-000001/weights.safetensors", "r.parquet"} <= found.keys()
    assert found == dict.fromkeys(found, oct(MODES[mask]))
    folders = {oct(p.stat().st_mode & 0o777) for p in (written, *written.rglob("*")) if p.is_dir()}
    assert folders == {oct(0o777 & ~mask)}
    assert not list(tmp_path.rglob(".*")), "nothing is left behind"
