"""DeepSpeed ZeRO on two ranks equals one plain process on the same batches. `pytest tests/learner/test_zero.py`"""

from __future__ import annotations

import contextlib

import numpy as np
import peft
import pytest
import torch
import torch.multiprocessing as mp

from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.adapters import add_adapters
from opdlm.learner.distill import DistillModule
from opdlm.learner.lora import merged_parameters
from opdlm.learner.packing import collate
from opdlm.learner.policy_gradient import gather_policy, is_left_out
from opdlm.learner.rows import build_rows
from opdlm.learner.targets import gather_targets
from tests.learner import zero_ranks
from tests.ports import free_ports
from tests.tiny import MASK, tiny_model

pytestmark = pytest.mark.zero


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def results(folder):
    (port,) = free_ports(1)
    mp.spawn(zero_ranks.run_rank, args=(2, port, str(folder)), nprocs=2)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def plain():
    return train_plainly(zero_ranks.student().train())


@pytest.fixture(scope="module")
def plain_tied():
    return train_plainly(zero_ranks.student(tied=True).train())


@pytest.fixture(scope="module")
def plain_lora():
    return train_lora_plainly(tied=False)


def train_lora_plainly(tied: bool):
    student = zero_ranks.student(tied=tied).train()
    add_adapters(student, zero_ranks.LORA, seed=0)
    figures = train_plainly(student)["figures"]
    merged = {n: p.clone() for n, p in merged_parameters(student, contextlib.nullcontext)}
    return {"figures": figures, "weights": merged}


def train_plainly(student):
    """The same steps without DeepSpeed, ranks or micro-batches: all rows in one batch, torch's AdamW."""
    head = tiny_model(1).lm_head.weight.detach()
    module = DistillModule(student, zero_ranks.OBJECTIVE, 1000)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=zero_ranks.RATE, betas=(0.9, 0.999), weight_decay=0.0)
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
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        figures.append((loss.item(), norm.item(), len(useful), len(rows) - len(useful)))
    return {"figures": figures, "weights": {n: p.detach() for n, p in student.named_parameters()}}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["zero", "tied"])
def test_two_ranks_equal_one_plain_process(results, plain, plain_tied, stage, kind) -> None:
    ours, plain = results[f"{kind}-{stage}"], plain if kind == "zero" else plain_tied
    for mine, reference in zip(ours["figures"], plain["figures"], strict=True):
        assert mine[:2] == pytest.approx(reference[:2], rel=1e-4)
        assert mine[2:] == reference[2:]
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_policy_gradient_on_two_ranks_equals_one_plain_process(results, stage) -> None:
    """All rows in one batch, one mean over all tokens of the step, torch's AdamW."""
    student = zero_ranks.student().train()
    module = DistillModule(student, zero_ranks.POLICY, 1000)
    optimizer = torch.optim.AdamW(student.parameters(), lr=zero_ranks.RATE, weight_decay=0.0)
    ours = results[f"policy-{stage}"]
    for batch, mine, figures in zip(zero_ranks.policy_batches(), ours["figures"], ours["policy"], strict=True):
        kept = [scored for scored in batch if not is_left_out(scored)]
        rng = np.random.default_rng(0)
        rows = [r for one in kept for r in build_rows(one, BlockGrid(4), zero_ranks.POLICY, MASK, rng)]
        rows = [row for row in rows if len(row.loss_positions)]
        tokens = sum(one.trajectory.response_length for one in kept)
        positions, weights = gather_policy(rows, zero_ranks.DRAWS), torch.full((tokens,), 1 / tokens)
        loss, _ = module(collate(rows), positions, weights)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        optimizer.step()
        assert mine[:2] == pytest.approx((loss.item(), norm.item()), rel=1e-4)
        assert mine[2:] == (len(rows), tokens)
        expected = positions.figures(zero_ranks.POLICY, weights)
        assert figures == pytest.approx(expected, rel=1e-4)
        assert 0 < expected["clipped_share"] < 1, "the clip takes effect"
    for name, weight in student.named_parameters():
        torch.testing.assert_close(ours["weights"][name], weight.detach(), rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "zero-3", "bf16", "lora-2", "lora-3"])
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


@pytest.mark.parametrize("name", ["1-float32", "2-float32", "3-float32", "2-bfloat16"])
def test_a_step_without_a_finite_gradient_is_skipped_on_every_rank(results, plain, name) -> None:
    found = results[f"skips-{name}"]
    assert found["skipped"] == [False, True, False]
    assert found["unchanged"], "a skipped step changed the weights"
    if "figures" in found:  # the steps before and after it equal those of a run without it
        for mine, reference in zip([found["figures"][0], found["figures"][2]], plain["figures"][:2], strict=True):
            assert mine == pytest.approx(reference[:2], rel=1e-4)


@pytest.mark.parametrize("name", ["lora-2", "lora-3", "tied-lora"])
def test_lora_on_two_ranks_equals_one_plain_process(results, plain_lora, name) -> None:
    tied = name == "tied-lora"
    ours, plain_lora = results[name], train_lora_plainly(tied) if tied else plain_lora
    for mine, reference in zip(ours["figures"], plain_lora["figures"], strict=True):
        assert mine[:2] == pytest.approx(reference[:2], rel=1e-4)
    start = dict(zero_ranks.student(tied=tied).named_parameters())
    assert set(ours["weights"]) == set(start), "merged weights come under the plain model's names"
    for name, weight in plain_lora["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, rtol=1e-3, atol=2e-4, msg=name)
        adapted = any(f"{layer}.weight" in name for layer in zero_ranks.LORA.target_modules)
        assert torch.equal(ours["weights"][name], start[name].detach()) != adapted, name


@pytest.mark.parametrize("name", ["lora-2-resumed-as-3", "lora-3-resumed-as-2"])
def test_lora_resumes_in_another_stage(results, plain_lora, name) -> None:
    for mine, reference in zip(results[name]["figures"], plain_lora["figures"][zero_ranks.SAVED_AFTER :], strict=True):
        assert mine[:2] == pytest.approx(reference[:2], rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_adapter_loads_in_peft_and_gives_the_merged_model(results, folder, stage) -> None:
    adapted = peft.PeftModel.from_pretrained(zero_ranks.student(), folder / f"adapter-lora-{stage}").eval()
    merged = zero_ranks.student()
    merged.load_state_dict(results[f"lora-{stage}"]["weights"])
    ids = torch.arange(3, 20)[None]
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)


def test_adapters_for_layers_that_are_not_there() -> None:
    lora = zero_ranks.LORA.model_copy(update={"target_modules": ["query"]})
    with pytest.raises(
        OpdlmError, match=r"model.lora.target_modules: no layer .* \['query'\]; its linear layers: down_p"
    ):
        add_adapters(zero_ranks.student(), lora, seed=0)
