"""The disk of the first of two ZeRO ranks is full: both go on, or both end. `pytest tests/learner/test_saving.py`"""

from __future__ import annotations

import json
import os
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open

from opdlm.common.checkpoint import damage, list_checkpoints
from opdlm.learner.distill import DistillModule
from tests.learner import zero_ranks
from tests.ports import free_ports
from tests.system.full_disk import no_file_above

pytestmark = pytest.mark.zero

WORLD = 2


def run_rank(rank: int, port: int, folder: str) -> None:
    """One rank: trains and saves, and writes what happened to `folder`/RANK.json, by ZeRO stage."""
    warnings.filterwarnings("ignore")
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    from opdlm.learner import zero
    from opdlm.learner.saving import GiveUp, Saver

    data, seen = zero_ranks.batches(), {}
    for stage in (2, 3):
        root = Path(folder) / f"zero-{stage}"
        config = zero_ranks.learner_config(stage, WORLD, micro_batch_tokens=40)
        engine = zero.initialise(DistillModule(zero_ranks.student(), zero_ranks.OBJECTIVE, 3), config, "float32")
        step, saver, told = zero_ranks.make_step(engine, config), Saver(engine, root, keep=1, max_failed=1), []

        def save(rounds: int, last: bool = False, saver=saver, told=told) -> None:
            problem = saver.save({"rounds": rounds})
            try:
                if problem:
                    saver.end_if_due(problem, rounds, last)
                told.append(problem)
            except GiveUp as end:
                told.append(f"GiveUp: {end}")

        def train(i: int, step=step) -> float:
            return step(data[i][rank::WORLD], data[i][0], zero_ranks.RATE).loss

        losses = [train(0)]
        save(1)
        with no_file_above(2000 if rank == 0 else 1 << 30):  # the second rank writes nothing, and its disk has room
            losses.append(train(1))
            save(2)
            losses.append(train(2))
            save(3)
            save(4, last=True)
        save(3)
        with no_file_above(2000):
            save(4)
            save(4, last=True)
        losses.append(train(3))
        saver.root = Path(folder) / "results.lock" / "below"  # below a file: the save fails before it writes any
        save(5, last=True)
        seen[stage] = {"told": told, "losses": losses, "left": sorted(p.name for p in root.iterdir())}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def test_a_save_holds_one_tensor_at_a_time(tmp_path, monkeypatch) -> None:
    """Gathered whole, the state of a model of 8 billion parameters would take 98 GB of the first rank's memory."""
    from opdlm.learner import zero

    shapes = {f"layer.{i}": torch.Size((3, i + 1)) for i in range(4)}
    monkeypatch.setattr(zero, "_shapes", lambda engine: shapes)
    monkeypatch.setattr(zero, "_adam_step", lambda engine: 7.0)
    alive: list[weakref.ref] = []

    def gathered():
        for name, shape in shapes.items():
            for key in (name, f"exp_avg.{name}", f"exp_avg_sq.{name}"):
                assert not any(earlier() is not None for earlier in alive), f"{key}: an earlier tensor is still held"
                tensor = torch.randn(shape)
                alive.append(weakref.ref(tensor))
                yield key, tensor
                del tensor

    zero.write_state(None, gathered(), tmp_path)
    assert len(alive) == 3 * len(shapes)
    assert zero.state_bytes(None) == sum(12 * shape.numel() for shape in shapes.values())
    with safe_open(tmp_path / "optimizer.safetensors", "pt") as moments:
        assert moments.metadata()["step"] == "7.0"
        assert moments.get_tensor("exp_avg_sq.layer.3").shape == (3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    (folder / "results.lock").touch()
    (port,) = free_ports(1)
    mp.spawn(run_rank, args=(port, str(folder)), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("stage", ["2", "3"])
def test_ranks_go_on_or_end_alike(folder, stage) -> None:
    first, second = (json.loads((folder / f"{rank}.json").read_text())[stage] for rank in range(WORLD))
    expected = [None, "failed", "GiveUp", "GiveUp", None, "failed", "GiveUp", "GiveUp"]
    for rank in (first, second):
        kinds = [told and ("GiveUp" if told.startswith("GiveUp") else "failed") for told in rank["told"]]
        assert kinds == expected
    assert first["losses"] == second["losses"], "a save that fails changes nothing in what is trained"
    whole = folder / f"zero-{stage}" / "round-000001"
    _, failed, twice, last, _, _, _, nowhere = first["told"]
    assert "File too large" in failed
    assert "MB to write" in failed
    assert "the checkpoint of round 3 was not written (2 in a row, checkpoint.max_failed_saves 1)" in twice
    assert f"the newest whole checkpoint is {whole}; make room and go on with --resume" in twice
    assert "the checkpoint of round 4 was not written (the run's last)" in last
    assert "Not a directory" in nowhere
    assert first["left"] == ["round-000003"]
    (kept,) = list_checkpoints(folder / f"zero-{stage}")
    assert damage(kept) is None
