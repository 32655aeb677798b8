"""Checkpoints survive a crash at any byte and a full disk. `pytest tests/common/test_checkpoint.py`"""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from opdlm.common.checkpoint import damage, latest_checkpoint, list_checkpoints, save_checkpoint
from opdlm.common.errors import OpdlmError
from tests.system.full_disk import no_file_above, small_disk


def _write(value: float):
    return lambda folder: save_file({"w": torch.full((64,), value)}, folder / "weights.safetensors")


def _save(root: Path, rounds: int, keep: int = 5) -> Path:
    return save_checkpoint(root, {"rounds": rounds, "note": "state"}, _write(float(rounds)), keep)


def test_the_newest_is_found_and_old_ones_are_removed(tmp_path) -> None:
    for rounds in (1, 2, 10):
        _save(tmp_path, rounds, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["round-000002", "round-000010"]
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.rounds, found.state["note"]) == (10, "state")
    assert latest_checkpoint(tmp_path / "none") is None
    older = latest_checkpoint(tmp_path, rounds=9)
    assert older is not None
    assert older.rounds == 2
    assert latest_checkpoint(tmp_path, rounds=1) is None


@pytest.mark.parametrize("file", ["weights.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, file, kind, caplog) -> None:
    _save(tmp_path, 1)
    newest = _save(tmp_path, 2) / file
    content = newest.read_bytes()
    if kind == "gone":
        newest.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        newest.write_bytes(content[:middle] if kind == "cut" else flipped)
    with caplog.at_level(logging.WARNING):
        found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.rounds == 1
    assert "round-000002 is damaged" in caplog.text


def test_a_manifest_that_names_too_little_and_a_checkpoint_of_other_rounds_are_damaged(tmp_path) -> None:
    whole = _save(tmp_path, 1)
    for rounds, content in ((2, "{}"), (3, "[]"), (4, ""), (5, None)):
        newest = _save(tmp_path, rounds, keep=9)
        if content is None:
            (newest / "more.safetensors").write_bytes((newest / "weights.safetensors").read_bytes())
        else:
            (newest / "manifest.json").write_text(content)
        assert damage(newest) is not None
        assert latest_checkpoint(tmp_path).folder == whole
    whole.rename(tmp_path / "round-000009")
    with pytest.raises(OpdlmError, match="no whole checkpoint among 5"):
        latest_checkpoint(tmp_path)


def test_it_is_an_error_if_all_checkpoints_are_damaged(tmp_path, caplog) -> None:
    """One line says so, and nothing is removed."""
    for rounds in (1, 2):
        (_save(tmp_path, rounds) / "state.json").unlink()
    with pytest.raises(OpdlmError, match=r"no whole checkpoint among 2 in .*; restore one from a backup") as caught:
        latest_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert caplog.text == ""
    assert len(list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("calls_before_crash", range(12))
def test_a_crash_at_any_file_system_call_leaves_a_whole_checkpoint(tmp_path, monkeypatch, calls_before_crash) -> None:
    """The process dies at the n-th file-system call of a save."""
    import os

    _save(tmp_path, 1)
    calls = 0

    class Crash(BaseException):
        pass

    def counted(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > calls_before_crash:
                raise Crash
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "open"), (Path, "write_text"), (Path, "mkdir")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            _save(tmp_path, 2)
        except Crash:
            survived = False
        else:
            survived = True
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert damage(found.folder) is None
    assert found.rounds == 2 if survived else found.rounds in (1, 2)
    _save(tmp_path, 2)
    assert latest_checkpoint(tmp_path).rounds == 2


def _contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("numbers", "note"), [(2000, 1), (1, 8000)], ids=["weights", "state"])
def test_a_full_disk_leaves_earlier_checkpoints_unchanged(tmp_path, numbers, note) -> None:
    """They stay even with keep=1, and when the same round is saved again."""
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    before = _contents(tmp_path)
    weights = {"w": torch.zeros(numbers)}
    for rounds in (2, 3):
        with no_file_above(4096), pytest.raises((OSError, SafetensorError), match="File too large"):
            save_checkpoint(
                tmp_path,
                {"rounds": rounds, "note": "x" * note},
                lambda folder: save_file(weights, folder / "weights.safetensors"),
                keep=1,
            )
        assert _contents(tmp_path) == before
        assert {p.name for p in tmp_path.iterdir()} == {"round-000001", "round-000002"}
    _save(tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["round-000003"]


def test_saving_to_a_real_full_disk_leaves_earlier_checkpoints_unchanged(tmp_path) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        root = disk.folder / "checkpoints"
        _save(root, 1)
        before = _contents(root)
        for leave in (65536, 8192, 4096, 0):  # the write of data, of a file, of the folder fails
            disk.fill(leave)
            with pytest.raises((OSError, SafetensorError), match="No space left"):
                save_checkpoint(
                    root,
                    {"rounds": 2},
                    lambda folder: save_file({"w": torch.zeros(1 << 16)}, folder / "weights.safetensors"),
                    keep=1,
                )
            assert _contents(root) == before
            disk.empty()
        _save(root, 2, keep=1)
        assert latest_checkpoint(root).rounds == 2


def test_a_save_succeeds_if_an_old_checkpoint_cannot_be_removed(tmp_path, monkeypatch, caplog) -> None:
    import shutil

    for rounds in (1, 2):
        _save(tmp_path, rounds)

    def refuse(folder, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(folder))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(shutil, "rmtree", refuse)
        _save(tmp_path, 3, keep=1)
    assert caplog.text.count("cannot be removed") == 2
    assert latest_checkpoint(tmp_path).rounds == 3
    _save(tmp_path, 4, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["round-000004"]


def test_damaged_checkpoints_of_later_rounds_do_not_count_as_kept(tmp_path) -> None:
    """The run went back from round 3 to round 1. With keep=1, saving round 2 must keep round 2, not round 3."""
    _save(tmp_path, 1)
    (_save(tmp_path, 3) / "state.json").unlink()
    assert latest_checkpoint(tmp_path).rounds == 1
    _save(tmp_path, 2, keep=1)
    assert latest_checkpoint(tmp_path).rounds == 2
    _save(tmp_path, 3, keep=1)
    assert latest_checkpoint(tmp_path).rounds == 3
    assert [p.name for p in tmp_path.iterdir()] == ["round-000003"]


def test_half_written_checkpoints_are_removed(tmp_path) -> None:
    """They take up room that the next save may need."""
    for name in (".new-round-000001.1234", ".old-round-000001.1234"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    _save(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["round-000001"]


def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path) -> None:
    """A malicious pickle in place of a file counts as damage, and no code unpickles it."""

    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "executed").touch, ())

    _save(tmp_path, 1)
    newest = _save(tmp_path, 2)
    (newest / "weights.safetensors").write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((newest / "manifest.json").read_text())
    assert latest_checkpoint(tmp_path).rounds == 1
    assert not (tmp_path / "executed").exists()
    assert set(manifest) == {"state.json", "weights.safetensors"}
