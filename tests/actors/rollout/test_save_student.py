"""A rollout actor writes the student of exactly one weight version.

`pytest tests/actors/rollout/test_save_student.py`
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from opdlm.actors.rollout import actor as module
from opdlm.actors.rollout.actor import RolloutActor
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import load_model
from opdlm.common.types import WeightHandle
from opdlm.common.weights import WeightPacker
from tests.system.full_disk import no_file_above


@pytest.fixture
def saved(chain_teacher, tmp_path, monkeypatch):
    """An actor, and the models of versions 0 to 2, which it fetches without Ray."""
    convert_checkpoint(chain_teacher, tmp_path / "start", 4, "absolute")
    models = [load_model(tmp_path / "start") for _ in range(3)]
    with torch.no_grad():
        for version, model in enumerate(models):
            for parameter in model.parameters():
                parameter.add_(version)
    packs = [WeightPacker().pack(v, model.named_parameters()) for v, model in enumerate(models)]
    monkeypatch.setattr(module, "ray", SimpleNamespace(get=lambda reference: packs[reference]))
    return RolloutActor(str(tmp_path / "start"), "float32", 1), models


def handle(version: int) -> WeightHandle:
    return WeightHandle(version, [version], 0)


def test_the_folder_decodes_as_the_run_does_and_holds_the_versions_weights(saved, tmp_path) -> None:
    actor, models = saved
    actor.load_weights(handle(0))
    folder = tmp_path / "best" / "round-000001"
    for version in (1, 2):  # the second time in place of an earlier one
        actor.save_student(handle(version), folder, BlockGrid(8, "response"), "sequential")
        held = load_model(folder).state_dict()
        assert all(held[name].equal(tensor) for name, tensor in models[version].state_dict().items())
    facts = read_facts(folder)
    assert (facts.block_size, facts.block_grid, facts.order) == (8, "response", "sequential")
    assert facts.mask_id == read_facts(tmp_path / "start").mask_id
    assert [path.name for path in folder.parent.iterdir()] == ["round-000001"]


def test_other_weights_are_never_written(saved, tmp_path) -> None:
    actor, _ = saved
    actor.load_weights(handle(2))
    with pytest.raises(ValueError, match="saving version 1: the actor has version 2"):
        actor.save_student(handle(1), tmp_path / "best", BlockGrid(4), "confidence")
    assert not (tmp_path / "best").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(saved, tmp_path) -> None:
    actor, _ = saved
    with no_file_above(1000), pytest.raises(OpdlmError, match=r"best could not be written: .*; make room"):
        actor.save_student(handle(1), tmp_path / "best", BlockGrid(4), "confidence")
    assert [path.name for path in tmp_path.iterdir()] == ["start"]
