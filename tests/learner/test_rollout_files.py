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
from opdlm.common.tensors import array_to_tensor, tensor_to_array
from opdlm.common.types import HiddenTargets, LogitsTargets, ScoredTrajectory, TeacherTargets, TopKTargets, Trajectory
from opdlm.learner.rollout_files import RolloutFacts, load_samples, read_header, round_file, save_round

FACTS = RolloutFacts(4, 4, "absolute", 11, "hidden", "feed", "abc float32")


def scored(index: int, kind: str, seed: int, prompt: int = 3, kept: int = 8, length: int = 6) -> ScoredTrajectory:
    """A trajectory with random contents."""
    rng = np.random.default_rng([seed, index])
    targets: TeacherTargets
    if kind == "hidden":
        states = torch.from_numpy(rng.normal(size=(length, 5)))
        targets = HiddenTargets(tensor_to_array(states.to(torch.bfloat16 if index % 2 else torch.float32)))
    elif kind == "topk":
        tokens = rng.integers(0, 11, (length, 2)).astype(np.int32)
        targets = TopKTargets(tokens, rng.normal(size=(length, 2)).astype(np.float32), 11)
    else:
        targets = LogitsTargets(rng.normal(size=(length, 11)).astype(np.float32))
    trajectory = Trajectory(
        index=index,
        prompt_id=f"données/{index} \"'<\n",
        prompt_ids=rng.integers(0, 11, prompt).astype(np.int32),
        response_ids=rng.integers(0, 11, kept).astype(np.int32),
        reveal_step=rng.integers(1, 9, kept).astype(np.int16),
        response_length=length,
        weight_version=int(rng.integers(0, 5)),
        finish_reason="eos" if seed % 2 else "length",
        denoising_steps=int(rng.integers(1, 9)),
        token_versions=rng.integers(5, 9, kept).astype(np.int32) if (seed + index) % 3 == 0 else None,
    )
    return ScoredTrajectory(trajectory, targets)


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
@settings(max_examples=60, deadline=None)
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
