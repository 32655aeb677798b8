"""Divergences, tails and targets. `pytest tests/learner/test_losses.py`"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdlm.actors.teacher.scoring import score
from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.grid import BlockGrid
from opdlm.common.types import ScoredTrajectory
from opdlm.learner.chunked_loss import chunked_loss, parts_of
from opdlm.learner.distill import DistillModule
from opdlm.learner.losses import divergence, forward_kl, jensen_shannon, restrict_to_top_k, reverse_kl
from opdlm.learner.packing import collate
from opdlm.learner.rows import build_rows
from opdlm.learner.targets import gather_targets
from opdlm.learner.tied_embedding import GradientHandover, embed
from tests.tiny import EOS, MASK, VOCABULARY, tiny_model, trajectory

OBJECTIVES = [
    ObjectiveConfig(),
    ObjectiveConfig(reverse_weight=1.0),
    ObjectiveConfig(reverse_weight=0.3),
    ObjectiveConfig(divergence="jsd", jsd_alpha=0.3),
]


def _pair(seed: int, spread: float, outcomes: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, outcomes, generator=generator) * spread
    return logits[0].log_softmax(-1), logits[1].log_softmax(-1)


def test_against_torch_distributions() -> None:
    teacher, student = _pair(0, 2.0)
    t, s = (torch.distributions.Categorical(logits=x) for x in (teacher, student))
    m = torch.distributions.Categorical(probs=0.3 * t.probs + 0.7 * s.probs)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(forward_kl(teacher, student), kl(t, s))
    torch.testing.assert_close(reverse_kl(teacher, student), kl(s, t))
    torch.testing.assert_close(jensen_shannon(teacher, student, 0.3), 0.3 * kl(t, m) + 0.7 * kl(s, m))
    mixed = divergence(teacher, student, ObjectiveConfig(reverse_weight=0.3))
    torch.testing.assert_close(mixed, 0.7 * kl(t, s) + 0.3 * kl(s, t))


@given(
    seed=st.integers(0, 10**6), spread=st.floats(0.1, 30), k=st.integers(1, 12), objective=st.sampled_from(OBJECTIVES)
)
def test_bucket_tail_is_a_true_divergence(seed, spread, k, objective) -> None:
    """Never negative, 0 between equal models, no larger than over all tokens (merging outcomes loses information)."""
    teacher, student = _pair(seed, spread)
    top, ids = teacher.topk(k, dim=-1)
    bucketed = divergence(*restrict_to_top_k(ids, top, student, "bucket"), objective)
    full = divergence(teacher, student, objective)
    assert (bucketed >= -1e-5).all()
    tails = [1 - model.gather(-1, ids).exp().sum(-1) for model in (teacher, student)]
    is_exact = (tails[0] > 1e-3) & (tails[1] > 1e-3)  # a smaller tail is mostly float32's rounding of 1 - mass
    assert (bucketed <= full + 1e-3 * (1 + full))[is_exact].all()
    same = divergence(*restrict_to_top_k(ids, top, teacher, "bucket"), objective)
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tail", ["drop", "bucket"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(tail, objective) -> None:
    teacher, student = _pair(3, 2.0)
    top, ids = teacher.topk(teacher.shape[-1], dim=-1)
    ours = divergence(*restrict_to_top_k(ids, top, student, tail), objective)
    torch.testing.assert_close(ours, divergence(teacher, student, objective), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("top_k", [0, 3, 12])
@pytest.mark.parametrize("tail", ["drop", "bucket"])
def test_zero_teacher_probabilities_give_no_nan(objective, top_k, tail) -> None:
    teacher, _ = _pair(4, 2.0)
    teacher[:, 2:] = float("-inf")
    teacher = teacher.log_softmax(-1)
    student = torch.randn(5, 12, requires_grad=True)
    log_s = student.log_softmax(-1)
    if top_k:
        top, ids = teacher.topk(top_k, dim=-1)
        losses = divergence(*restrict_to_top_k(ids, top, log_s, tail), objective)
    else:
        losses = divergence(teacher, log_s, objective)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().sum() > 0


def _batch(kind: str, objective: ObjectiveConfig, teacher, top_k: int = 31):
    trajectories = [
        trajectory([5, 6, 7], [8, 9, 10, 11, EOS, 13, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 7, 9], 5),
        trajectory([5, 0, 7, 8], [9, 3, 3, 3], [1, 1, 2, 2]),  # a pad id in the prompt
    ]
    scored = [
        ScoredTrajectory(t, s) for t, s in zip(trajectories, score(teacher, trajectories, kind, top_k, 64), strict=True)
    ]
    rows = [r for s in scored for r in build_rows(s, BlockGrid(4), objective, MASK, np.random.default_rng(1))]
    return collate(rows), gather_targets(rows, teacher.lm_head.weight.detach(), objective)


@pytest.mark.parametrize("objective", [*OBJECTIVES, ObjectiveConfig(top_k=4), ObjectiveConfig(top_k=4, tail="bucket")])
def test_target_kinds_agree(objective) -> None:
    """Hidden states, logits and (where the loss is over the top K) top-K targets give the same losses."""
    teacher, student = tiny_model(1, vocab_size=31), tiny_model(2)  # the student has an added mask row
    kinds = ["hidden", "logits"] + (["topk"] if objective.top_k else [])
    results = []
    for kind in kinds:
        batch, targets = _batch(kind, objective, teacher)
        module = DistillModule(student, objective, logits_chunk=5)
        results.append(module(batch, targets, torch.ones(len(batch.loss_row)))[1])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["hidden", "logits"])
@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_the_teachers_temperature_divides_its_logits(kind, temperature) -> None:
    """The loss in closed form and the one that autograd takes; the student's own logits stay as they are."""
    teacher, plain = tiny_model(1), ObjectiveConfig(exclude_eos=False)
    batch, targets = _batch("logits", plain, teacher)
    logits = torch.randn(len(batch.loss_row), VOCABULARY)
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), (targets.values / temperature).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    _, targets = _batch(kind, plain, teacher)
    weights = torch.ones(len(logits))
    for mixed in (0.0, 1e-7):  # a weight of the reverse KL makes autograd take the gradient
        objective = ObjectiveConfig(exclude_eos=False, teacher_temperature=temperature, reverse_weight=mixed)
        torch.testing.assert_close(targets.losses(logits, objective), expected, rtol=1e-4, atol=1e-5)
        losses, gradient = targets.losses_with_gradient(logits.clone(), weights, objective)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        soft = (_batch("logits", plain, teacher)[1].values / temperature).softmax(-1)
        torch.testing.assert_close(gradient, logits.softmax(-1) - soft, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 700), st.sampled_from([1, 5, 64, 128, 256]))
def test_parts_hold_each_position_once_and_have_few_sizes(positions, chunk) -> None:
    parts = list(parts_of(positions, chunk))
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(positions))
    sizes = [part.stop - part.start for part in parts]
    assert all(0 < size <= chunk for size in sizes)
    assert all(size < 64 or size % 64 == 0 for size in sizes)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_do_not_depend_on_chunks_or_checkpointing(chunk, checkpointing, tied) -> None:
    """With recomputed layers, and chunk by chunk, the gradient equals that of the loss written out directly here."""
    objective, teacher = ObjectiveConfig(exclude_eos=False), tiny_model(1)
    student = tiny_model(2, tied=tied)
    batch, targets = _batch("logits", objective, teacher)
    weights = torch.rand(len(batch.loss_row))

    from opdlm.common.masks import training_mask
    from opdlm.common.model.load import hidden_states

    mask = training_mask(batch.samples, batch.copies, batch.blocks)
    logits = student.lm_head(hidden_states(student, batch.input_ids, batch.position_ids, mask))
    at_loss = logits[batch.loss_line, batch.loss_column].log_softmax(-1)
    direct = (
        torch.nn.functional.kl_div(at_loss, targets.values.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        * weights
    ).sum()
    direct.backward()
    expected = {n: p.grad.clone() for n, p in student.named_parameters()}

    student.zero_grad()
    student.train()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    loss, _ = DistillModule(student, objective, chunk)(batch, targets, weights)
    loss.backward()
    torch.testing.assert_close(loss, direct, rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("objective", [*OBJECTIVES, ObjectiveConfig(top_k=4), ObjectiveConfig(top_k=4, tail="bucket")])
@pytest.mark.parametrize("kind", ["hidden", "logits", "topk"])
@pytest.mark.parametrize("rows", [31, 32])
def test_gradients_taken_at_once_are_those_of_autograd(objective, kind, rows) -> None:
    """Also where a probability of the teacher is 0, and where the student has one row more than the teacher."""
    batch, targets = _batch(kind, objective, tiny_model(1, vocab_size=31))
    if kind == "logits":
        targets.values[::2, 3:9] = float("-inf")
    logits = 5 * torch.randn(len(batch.loss_row), rows, requires_grad=True)
    weights = torch.rand(len(batch.loss_row))
    expected = targets.losses(logits, objective)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    losses, ours = targets.losses_with_gradient(logits.detach().clone(), weights, objective)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)


def test_taking_gradients_leaves_the_targets_unchanged() -> None:
    """The student's logits may be overwritten, the targets may not."""
    _, targets = _batch("logits", ObjectiveConfig(), tiny_model(1))
    before = targets.values.clone()
    targets.losses_with_gradient(torch.randn(before.shape), torch.ones(len(before)), ObjectiveConfig())
    assert torch.equal(targets.values, before)


def test_a_loss_goes_backward_once_and_is_scaled_by_the_incoming_gradient() -> None:
    batch, targets = _batch("logits", ObjectiveConfig(), tiny_model(1))
    hidden, matrix = torch.randn(len(batch.loss_row), 16), torch.randn(32, 16)
    gradients = []
    for scale in (1.0, 3.0):
        leaves = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
        loss, _ = chunked_loss(*leaves, targets, torch.ones(len(hidden)), ObjectiveConfig(), 4)
        (scale * loss).backward(retain_graph=True)
        gradients.append([leaf.grad.clone() for leaf in leaves])
        with pytest.raises(RuntimeError, match="one backward pass"):
            loss.backward()
    for once, thrice in zip(*gradients, strict=True):
        torch.testing.assert_close(thrice, 3 * once)


def test_rows_of_a_frequent_token_are_summed_in_float32() -> None:
    """One token has one large gradient and a thousand small ones, which a sum in bfloat16 would lose."""
    weight, handover = torch.randn(6, 4).bfloat16().requires_grad_(), GradientHandover()
    rows = embed(weight, torch.full((1, 1001), 3), None, handover)
    handover.gradient = torch.zeros_like(weight)
    above = torch.full_like(rows, 1e-3)
    above[0, 0] = 1.0
    rows.backward(above)
    torch.testing.assert_close(weight.grad[3], torch.full((4,), 2.0).bfloat16(), rtol=0.01, atol=0)
    assert weight.grad[[0, 1, 2, 4, 5]].abs().sum() == 0


def test_added_mask_row_is_no_outcome() -> None:
    """The student has one row more than its teacher, the mask token's. Its logit changes no loss."""
    objective = ObjectiveConfig(reverse_weight=0.5)
    teacher = tiny_model(1, vocab_size=31)
    batch, targets = _batch("logits", objective, teacher)
    student = torch.randn(len(batch.loss_row), 32)
    before = targets.losses(student, objective)
    student[:, 31] += 50.0
    torch.testing.assert_close(targets.losses(student, objective), before)
    assert torch.isfinite(before).all()
