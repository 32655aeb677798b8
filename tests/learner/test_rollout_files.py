"""Saved rollouts: what is read is what was written. `pytest tests/learner/test_rollout_files.py`"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from opdlm.common.errors import OpdlmError
from opdlm.common.tensors import array_to_tensor
from opdlm.learner.rollout_files import RolloutFacts, load_samples, read_header, round_file, save_round
from tests.tiny import scored

FACTS = RolloutFacts(4, 4, "absolute", 11, "hidden", "feed", "abc float32")


def same(one: object, other: object) -> bool:
    """Equal types, fields, dtypes, shapes and bits."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if hasattr(type(one), "__slots__"):
        return type(one) is type(other) and all(same(getattr(one, n), getattr(other, n)) for n in type(one).__slots__)
    return type(one) is type(other) and one == other


@given(
    kind=st.sampled_from(["hidden", "topk", "logits"]),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=5),
    first=st.integers(0, 1000),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_what_is_read_is_what_was_written(kind, shapes, first, seed) -> None:
    samples = [
        scored(first + i, kind, seed, prompt, kept, max(kept - short, 1))
        for i, (prompt, kept, short) in enumerate(shapes)
    ]
    facts = RolloutFacts(len(samples), 4, "response", 11, kind, "beef", "abc float32")
    indices = [s.trajectory.index for s in samples]
    with tempfile.TemporaryDirectory() as folder:
        file = round_file(Path(folder) / "rollouts", first)
        save_round(file, samples, facts)
        written = file.read_bytes()
        assert all(same(a, b) for a, b in zip(load_samples(file, indices), samples, strict=True))
        assert same(load_samples(file, indices[-1:])[0], samples[-1])
        header = read_header(file)
        save_round(file, samples, facts)
        assert file.read_bytes() == written, "the same round must give the same file"
        assert [path.name for path in file.parent.iterdir()] == [f"round-{first:06d}.safetensors"]
    assert header.facts == facts
    assert header.weight_versions == {s.trajectory.index: s.trajectory.weight_version for s in samples}
    assert set(header.target_widths.values()) == {{"hidden": 5, "topk": 2, "logits": 11}[kind]}


def test_bfloat16_states_stay_bfloat16(tmp_path) -> None:
    sample = scored(1, "hidden", 0)
    save_round(tmp_path / "r", [sample], FACTS)
    read = array_to_tensor(load_samples(tmp_path / "r", [1])[0].targets.hidden)
    assert read.dtype is torch.bfloat16
    assert read.equal(array_to_tensor(sample.targets.hidden))


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch) -> None:
    file = tmp_path / "round-000000.safetensors"
    save_round(file, [scored(0, "hidden", 0)], FACTS)
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_round(file, [scored(0, "hidden", 1)], FACTS)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_damaged_and_foreign_files_are_named(tmp_path) -> None:
    file = tmp_path / "round-000000.safetensors"
    save_round(file, [scored(0, "hidden", 0)], FACTS)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(OpdlmError, match=r"round-000000.safetensors cannot be read"):
        read_header(file)
    save_file({"weight": np.zeros(3, np.float32)}, file)
    with pytest.raises(OpdlmError, match="holds something else; expected a file of a run with"):
        read_header(file)
