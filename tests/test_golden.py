"""Losses, gradients, training states and decoded tokens equal those of the public release (METHOD.md section 9).

`pytest tests/test_golden.py`; for another folder of the same layout: `OPDLM_GOLDEN=DIR pytest tests/test_golden.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.scoring import score
from opdlm.common.grid import BlockGrid
from opdlm.common.model.load import load_model
from opdlm.common.rewards.advantage import advantages
from opdlm.common.types import RolloutRequest, ScoredTrajectory
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import collate, pack
from opdlm.learner.policy_gradient import Draws, gather_policy
from opdlm.learner.rows import build_row, build_rows
from opdlm.learner.states import ChosenStates
from opdlm.learner.targets import gather_targets
from tests import golden_files

RELATIVE = 1e-4
"""Tolerance, relative to the reference value."""


@pytest.fixture(scope="module")
def device() -> torch.device:
    """`tests/gpu/test_golden.py` repeats these tests on another one."""
    return torch.device("cpu")


@pytest.fixture(scope="module")
def student(device):
    return load_model(golden_files.ROOT / "models" / "student").to(device)


@pytest.fixture(scope="module")
def teacher(device):
    return load_model(golden_files.ROOT / "models" / "teacher").to(device)


@pytest.mark.parametrize("path", golden_files.cases("train") + golden_files.cases("shift"), ids=lambda p: p.stem)
@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
def test_loss_and_gradients(path, kind, device, student, teacher) -> None:
    case = golden_files.load(path)
    objective = golden_files.objective_of(case)
    if kind == "topk" and objective.top_k == 0:
        objective = objective.model_copy(update={"top_k": student.config.vocab_size})  # K = V is the full KL
    grid, form = BlockGrid(case["block_size"], case["block_grid"]), golden_files.form_of(case)
    trajectories = [golden_files.trajectory_of(row, case) for row in case["rows"]]
    targets = score(teacher, trajectories, kind, objective.top_k or 1, batch_tokens=64)
    rows = [
        build_row(ScoredTrajectory(t, target), _masked(row, case), grid, case["mask_id"], objective.exclude_eos, form)
        for t, target, row in zip(trajectories, targets, case["rows"], strict=True)
    ]
    assert [row.loss_positions.tolist() for row in rows] == [row["loss_positions"] for row in case["rows"]]

    batch = collate(rows)
    weights = torch.cat([torch.full((len(r.loss_positions),), 1 / len(r.loss_positions) / len(rows)) for r in rows])
    module = DistillModule(student, objective, logits_chunk=7, form=form)
    student.zero_grad()
    targets_at_loss = gather_targets(rows, teacher.lm_head.weight, objective).to(device)
    loss, losses = module(batch.to(device), targets_at_loss, weights.to(device))
    loss.backward()

    per_row = losses.cpu().split([len(row.loss_positions) for row in rows])
    for ours, row in zip(per_row, case["rows"], strict=True):
        torch.testing.assert_close(ours, torch.tensor(row["loss_per_position"]), rtol=RELATIVE, atol=1e-5)
        assert ours.mean().item() == pytest.approx(row["loss"], rel=RELATIVE)
    assert loss.item() == pytest.approx(case["loss"], rel=RELATIVE)
    _compare_gradients(student, case["grad_norm"], path)


@pytest.mark.parametrize("path", golden_files.cases("train"), ids=lambda p: p.stem)
def test_teacher_log_probabilities(path, student, teacher) -> None:
    case = golden_files.load(path)
    reference = load_file(path.with_suffix(".safetensors"))
    if "student_logprobs_at_loss" not in reference:
        pytest.fail(f"{path.stem} has no log-probabilities")
    grid = BlockGrid(case["block_size"], case["block_grid"])
    trajectories = [golden_files.trajectory_of(row, case) for row in case["rows"]]
    targets = score(teacher, trajectories, "logits", 1, batch_tokens=64)
    exclude = case["objective"]["exclude_eos"]
    rows = [
        build_row(ScoredTrajectory(t, target), _masked(row, case), grid, case["mask_id"], exclude)
        for t, target, row in zip(trajectories, targets, case["rows"], strict=True)
    ]
    at_loss = gather_targets(rows, None, golden_files.objective_of(case)).values.log_softmax(-1)
    torch.testing.assert_close(at_loss, reference["teacher_logprobs_at_loss"], rtol=RELATIVE, atol=1e-5)


@pytest.mark.parametrize("path", golden_files.cases("train"), ids=lambda p: p.stem)
def test_visited_states_contain_the_reference_rows(path) -> None:
    """`all_states` gives exactly the reference's rows. Each block of every other reference row is a visited state."""
    case = golden_files.load(path)
    grid = BlockGrid(case["block_size"], case["block_grid"])
    objective = golden_files.objective_of(case).model_copy(update={"selection": "all_states"})
    first_of_sample = {row["sample"]: row for row in reversed(case["rows"])}
    for sample, row in first_of_sample.items():
        trajectory = golden_files.trajectory_of(row, case)
        kept = grid.kept_length(len(row["prompt_ids"]), trajectory.response_length)
        ours = build_rows(golden_files.unscored(trajectory), grid, objective, case["mask_id"], np.random.default_rng(0))
        visited = [r.input_ids[-len(row["response_ids"]) :][:kept].tolist() for r in ours]
        theirs = [r["noisy_response_ids"][:kept] for r in case["rows"] if r["sample"] == sample]
        if "all_states" in path.stem:
            assert visited == theirs
        elif "random_mask" not in path.stem:
            size = case["block_size"]
            for start in range(0, kept, size):
                blocks = {tuple(v[start : start + size]) for v in visited}
                assert all(tuple(t[start : start + size]) in blocks for t in theirs)


@pytest.mark.parametrize("path", golden_files.cases("decode"), ids=lambda p: p.stem)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_decoded_tokens_and_reveal_steps(path, batch_size, student) -> None:
    case = golden_files.load(path)
    settings = DecodeSettings(
        block_size=case["block_size"],
        block_grid=case["block_grid"],
        strategy=case["strategy"],
        threshold=case["threshold"],
        denoising_steps=case["denoising_steps"],
        temperature=case["temperature"],
        ignore_eos=case["ignore_eos"],
    )
    limit = case["max_new_tokens"]
    requests = [
        RolloutRequest(i, str(i), np.array(ids, dtype=np.int32), limit, seed=i) for i, ids in enumerate(case["prompts"])
    ]
    decoder = BlockDecoder(student, settings, case["mask_id"], [case["eos_id"]], batch_size)
    trajectories, _ = decoder.decode(requests)
    for ours, tokens, steps in zip(trajectories, case["outputs"], case["reveal_step"], strict=True):
        assert ours.response.tolist() == tokens[:limit]  # the release may exceed the limit by one token
        assert ours.reveal_step[: ours.response_length].tolist() == steps[:limit]


@pytest.mark.parametrize("path", golden_files.cases("rl"), ids=lambda p: p.stem)
def test_policy_gradient(path, device) -> None:
    """Advantages, log-probabilities, ratios, surrogates, clipped share, loss and gradients (METHOD.md section 7)."""
    case = golden_files.load(path)
    objective = golden_files.objective_of(case)
    student = load_model(golden_files.ROOT / "models" / case["model"]).to(device)
    for group in case["groups"]:
        expected = None if group["dropped"] else [sample["advantage"] for sample in group["samples"]]
        ours = advantages([sample["reward"] for sample in group["samples"]], objective.advantage)
        assert ours is expected is None or ours == pytest.approx(expected, rel=RELATIVE)
    samples = golden_files.group_trajectories(case)
    grid, rng = BlockGrid(case["block_size"], case["block_grid"]), np.random.default_rng(0)
    rows = [row for scored, _ in samples for row in build_rows(scored, grid, objective, case["mask_id"], rng)]
    count = sum(len(row.loss_positions) for row in rows)
    assert count == case["tokens"]
    positions = gather_policy(rows, Draws(case["temperature"], (case["mask_id"],))).to(device)
    module = DistillModule(student, objective, logits_chunk=7)
    loss, losses = module(pack(rows).to(device), positions, torch.full((count,), 1 / count, device=device))
    loss.backward()

    def of_each_sample(values: torch.Tensor) -> list[torch.Tensor]:
        """Values of the loss positions -> by sample, in the order of the response."""
        parts = values.cpu().split([len(row.loss_positions) for row in rows])
        found = []
        for scored, _ in samples:
            mine = [(row.loss_positions, part) for row, part in zip(rows, parts, strict=True) if row.scored is scored]
            order = torch.from_numpy(np.concatenate([places for places, _ in mine])).argsort()
            found.append(torch.cat([part for _, part in mine])[order])
        return found

    distance = objective.kl_beta * positions.distance()
    for name, values in [
        ("new_logprobs", positions.new_logprobs),
        ("ratio", positions.ratio()),
        ("surrogate", distance - losses),
    ]:
        for ours, (_, sample) in zip(of_each_sample(values), samples, strict=True):
            theirs = torch.tensor(sample["expected"][name])
            torch.testing.assert_close(ours, theirs, rtol=RELATIVE, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert positions.is_clipped(objective).float().mean().item() == pytest.approx(case["clipped_share"])
    assert loss.item() == pytest.approx(case["loss"], rel=RELATIVE, abs=1e-6)
    _compare_gradients(student, case["grad_norm"], path)


def _compare_gradients(student: torch.nn.Module, norm: float, path: Path) -> None:
    """The gradients' norm, and those that the reference file names."""
    found = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    assert found.item() == pytest.approx(norm, rel=RELATIVE)
    reference = load_file(path.with_suffix(".safetensors"))
    named = dict(student.named_parameters())
    gradients = {k.removeprefix("grad."): v for k, v in reference.items() if k.startswith("grad.")}
    assert gradients, "the reference file names no gradients"
    for name, gradient in gradients.items():
        difference = (named[name].grad.cpu() - gradient).norm() / gradient.norm()
        assert difference < RELATIVE, f"gradient of {name} is off by {difference:.1e}"


def _masked(row: dict, case: dict) -> ChosenStates:
    masked = np.array(row["noisy_response_ids"]) == case["mask_id"]
    return ChosenStates(masked, masked)
