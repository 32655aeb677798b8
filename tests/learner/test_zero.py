"""DeepSpeed ZeRO on two ranks against one plain process, same batches. `pytest tests/learner/test_zero.py`"""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp

from learner.distill import DistillModule
from learner.rows import build_rows, collate
from learner.targets import gather_targets
from tests.learner import zero_ranks
from tests.tiny import MASK, tiny_model

pytestmark = pytest.mark.zero


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(zero_ranks.run_rank, args=(2, port, str(folder)), nprocs=2)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def plain():
    """The same steps without DeepSpeed, ranks or micro-batches: all rows in one batch, torch's AdamW."""
    import numpy as np

    from common.grid import BlockGrid

    student, head = zero_ranks.student().train(), tiny_model(1).lm_head.weight.detach()
    module = DistillModule(student, zero_ranks.OBJECTIVE, 1000)
    optimizer = torch.optim.AdamW(student.parameters(), lr=zero_ranks.RATE, betas=(0.9, 0.999), weight_decay=0.0)
    figures = []
    for batch in zero_ranks.batches():
        rows = []
        for scored in batch:
            rng = np.random.default_rng([0, scored.trajectory.index])
            rows += build_rows(scored, BlockGrid(4), zero_ranks.OBJECTIVE, MASK, rng)
        useful = [r for r in rows if len(r.loss_positions)]
        weights = torch.cat(
            [torch.full((len(r.loss_positions),), 1 / len(r.loss_positions) / len(useful)) for r in useful]
        )
        loss, _ = module(collate(useful), gather_targets(useful, head, zero_ranks.OBJECTIVE), weights)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        optimizer.step()
        figures.append((loss.item(), norm.item(), len(useful), len(rows) - len(useful)))
    return {"figures": figures, "weights": {n: p.detach() for n, p in student.named_parameters()}}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_equal_one_plain_process(results, plain, stage) -> None:
    ours = results[f"zero-{stage}"]
    for mine, reference in zip(ours["figures"], plain["figures"], strict=True):
        assert mine[:2] == pytest.approx(reference[:2], rel=1e-4)
        assert mine[2:] == reference[2:]
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "zero-3", "bf16"])
def test_resume_is_exact(results, name) -> None:
    """Saved after two steps, loaded into a new engine: the same losses and weights to the bit."""
    whole, resumed = results[name], results[f"{name}-resumed"]
    assert resumed["figures"] == whole["figures"][zero_ranks.SAVED_AFTER :]
    for parameter, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][parameter], weight), parameter


@pytest.mark.parametrize("name", ["zero-1-resumed-as-3", "zero-2-resumed-as-1", "zero-3-resumed-as-2"])
def test_resume_in_another_stage(results, plain, name) -> None:
    for mine, reference in zip(results[name]["figures"], plain["figures"][zero_ranks.SAVED_AFTER :], strict=True):
        assert mine[:2] == pytest.approx(reference[:2], rel=1e-4)
