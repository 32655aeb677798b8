"""Which checkpoint a starting learner group goes on from. `pytest tests/learner/test_restore.py`"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from opdlm.common.checkpoint import save_checkpoint
from opdlm.learner import saving
from opdlm.learner.saving import BehindQueue, GiveUp, Saver


@pytest.fixture
def saver(tmp_path, monkeypatch) -> Iterator[Saver]:
    """The saver of a group of one rank. `engine.loaded` has the folders that were loaded into it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    engine = SimpleNamespace(device="cpu", loaded=[])
    monkeypatch.setattr(saving.zero, "load_state", lambda engine, folder: engine.loaded.append(folder.name))
    yield Saver(engine, tmp_path / "checkpoints", keep=9, max_failed=0)
    dist.destroy_process_group()


def save(saver: Saver, *rounds: int) -> list[Path]:
    return [save_checkpoint(saver.root, {"rounds": r}, lambda folder: None, keep=9) for r in rounds]


def test_the_newest_one_that_the_queue_knows_of(saver) -> None:
    assert saver.restore(0) is None
    save(saver, 2, 4, 6)
    found = saver.restore(4)
    assert found is not None
    assert found.rounds == 4
    assert saver.engine.loaded == ["round-000004"]


@pytest.mark.parametrize("damaged", ["manifest.json", "state.json", "all"])
def test_an_older_one_ends_the_group(saver, damaged) -> None:
    """The queue has let go of rounds 2 and 3. A group that went on from round 2 would wait for them for ever."""
    _, newest = save(saver, 2, 4)
    for file in newest.iterdir():
        if damaged in (file.name, "all"):
            file.unlink()
    with pytest.raises(BehindQueue, match=r"the checkpoint of round 4 in .* is damaged or gone; .* the one of round 2"):
        saver.restore(4)
    assert saver.engine.loaded == []


def test_no_whole_one_is_an_end_that_no_restart_removes(saver) -> None:
    with pytest.raises(GiveUp, match=r"the checkpoint of round 4 in .* is gone"):
        saver.restore(4)
    for folder in save(saver, 2, 4):
        (folder / "state.json").unlink()
    with pytest.raises(GiveUp, match="no whole checkpoint among 2"):
        saver.restore(4)
    assert len(list(saver.root.iterdir())) == 2, "nothing is deleted"
