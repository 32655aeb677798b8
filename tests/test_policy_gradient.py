"""The policy gradient on the decoder's own rollouts (METHOD.md section 7). `pytest tests/test_policy_gradient.py`

The log-probabilities that training computes are those that the decoder drew with; at ratio 1 the gradient is
REINFORCE's; and where positions are chosen without a look at what was drawn, it is the gradient of the expected reward.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.remasking import STRATEGIES
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.scoring import score
from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.form import PAPER_FORM
from opdlm.common.masks import training_mask
from opdlm.common.model.load import hidden_states
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import PolicyTargets, RolloutRequest, ScoredTrajectory
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import collate, pack
from opdlm.learner.policy_gradient import Draws, gather_policy
from opdlm.learner.rows import build_rows
from opdlm.learner.targets import gather_targets
from tests.tiny import EOS, FORMS_AND_GRIDS, MASK, OTHER_FAMILIES, request, tiny_model

OBJECTIVE = ObjectiveConfig(kind="rl", clip_low=0.2, clip_high=0.2)
MODELS = [tiny_model(30), tiny_model(31, tied=True), tiny_model(32, **OTHER_FAMILIES["llama"])]


def rollouts(model, how: DecodeSettings, requests, form):
    decoder = BlockDecoder(model, how, MASK, [EOS], batch_size=3, form=form)
    trajectories, _ = decoder.decode(requests)
    return trajectories, decoder.grid


def policy_loss(model, trajectories, advantages, grid, form, temperature, objective=OBJECTIVE, seed=0):
    """Runs the forward of the policy gradient; returns (loss with weight 1 / tokens, the positions)."""
    samples = [ScoredTrajectory(t, PolicyTargets(a)) for t, a in zip(trajectories, advantages, strict=True)]
    rng = np.random.default_rng(seed)
    rows = [row for sample in samples for row in build_rows(sample, grid, objective, MASK, rng, form)]
    rows = [row for row in rows if len(row.loss_positions)]
    positions = gather_policy(rows, Draws(temperature, (MASK,)))
    weights = [row.loss_weights for row in rows]
    tokens = sum(t.response_length for t in trajectories)
    module = DistillModule(model, objective, logits_chunk=5, form=form)
    loss, _ = module(pack(rows), positions, torch.from_numpy(np.concatenate(weights)).float() / tokens)
    return loss, positions


@given(
    model=st.sampled_from(MODELS),
    block_size=st.integers(1, 6),
    form_and_grid=st.sampled_from(FORMS_AND_GRIDS),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    confidence=st.sampled_from(["sampled", "max_probability"]),
    temperature=st.sampled_from([0.6, 1.0]),
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40)
def test_the_ratio_is_one_on_policy(
    model, block_size, form_and_grid, strategy, confidence, temperature, lengths, seed
) -> None:
    form, grid_kind = form_and_grid
    how = DecodeSettings(block_size, grid_kind, strategy, 0.4, 1.0, temperature=temperature)
    how = replace(how, confidence=confidence, keep_logprobs=True)
    requests = [request(p, i, limit, seed) for i, (p, limit) in enumerate(lengths)]
    trajectories, grid = rollouts(model, how, requests, form)
    with torch.no_grad():
        _, positions = policy_loss(model, trajectories, [1.0] * len(trajectories), grid, form, temperature)
    assert len(positions.new_logprobs) == sum(t.response_length for t in trajectories), "each token once"
    torch.testing.assert_close(positions.ratio(), torch.ones_like(positions.new_logprobs), rtol=0, atol=1e-4)


def test_the_gradient_at_ratio_one_is_reinforce() -> None:
    """Against autograd through -mean(A log p), one dense forward for each state of each response."""
    model, form_and_grid = tiny_model(33), FORMS_AND_GRIDS[0]
    form, grid_kind = form_and_grid
    how = DecodeSettings(4, grid_kind, "low_confidence_static", temperature=1.0, keep_logprobs=True)
    trajectories, grid = rollouts(model, how, [request(5 + i, i, 9) for i in range(3)], form)
    advantages = [0.7, -1.3, 0.4]
    loss, _ = policy_loss(model, trajectories, advantages, grid, form, 1.0)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = sum(t.response_length for t in trajectories)
    by_hand = torch.zeros(())
    for t, advantage in zip(trajectories, advantages, strict=True):
        sample = ScoredTrajectory(t, PolicyTargets(advantage))
        for row in build_rows(sample, grid, OBJECTIVE, MASK, np.random.default_rng(0), form):
            batch = collate([row])
            mask = training_mask(batch.samples, batch.copies, batch.blocks)
            logits = model.lm_head(hidden_states(model, batch.input_ids, batch.position_ids, mask))[0].float()
            logits = logits.index_fill(1, torch.tensor([MASK]), float("-inf"))
            tokens = torch.from_numpy(t.response_ids[row.loss_positions].astype(np.int64))
            chosen = logits.log_softmax(-1)[torch.from_numpy(row.loss_columns), tokens]
            by_hand = by_hand - advantage * chosen.sum() / total
    by_hand.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
def test_rewards_and_teacher_together_are_the_sum_of_both(kind) -> None:
    """`objective.opd_weight`: losses and gradients, at the same tokens in the same states."""
    model, teacher = tiny_model(34), tiny_model(35)
    how = DecodeSettings(4, "response", "low_confidence_static", temperature=1.0, keep_logprobs=True)
    trajectories, grid = rollouts(model, how, [request(5 + i, i, 9) for i in range(3)], PAPER_FORM)
    targets, head = score(teacher, trajectories, kind, 5, batch_tokens=64), teacher.lm_head.weight.detach()
    top_k = {"top_k": 5} if kind == "topk" else {}
    mixed = OBJECTIVE.model_copy(update={"opd_weight": 0.3, **top_k})
    rows = [
        row
        for trajectory, advantage, of_teacher in zip(trajectories, [0.7, -1.3, 0.4], targets, strict=True)
        for row in build_rows(
            ScoredTrajectory(trajectory, PolicyTargets(advantage, teacher=of_teacher)),
            grid,
            mixed,
            MASK,
            np.random.default_rng(0),
        )
        if len(row.loss_positions)
    ]
    teachers = gather_targets(rows, head, mixed)
    weights = torch.rand(sum(len(row.loss_positions) for row in rows))
    module = DistillModule(model, mixed, logits_chunk=5)

    def gradients_of(positions):
        model.zero_grad()
        loss, losses = module(pack(rows), positions, weights)
        loss.backward()
        return losses, {name: p.grad.clone() for name, p in model.named_parameters()}

    both, of_both = gradients_of(gather_policy(rows, Draws(1.0, (MASK,)), teachers))
    policy, of_policy = gradients_of(gather_policy(rows, Draws(1.0, (MASK,))))
    distance, of_distance = gradients_of(teachers)
    torch.testing.assert_close(both, policy + 0.3 * distance)
    for name, gradient in of_both.items():
        torch.testing.assert_close(gradient, of_policy[name] + 0.3 * of_distance[name], rtol=1e-4, atol=1e-6)


WORDS, PROMPT = (4, 5, 6), np.array([7, 8, 9], dtype=np.int32)
NEVER = tuple(i for i in range(32) if i not in WORDS)
REWARD = {pair: np.random.default_rng(pair).normal() for pair in itertools.product(WORDS, WORDS)}
"""Of each response of two words."""


def states_of(model, requires_grad: bool):
    """Log-probabilities of three words at both positions, `[2, 3]`, by what is revealed: None or a word at each."""

    def at(first: int | None, second: int | None) -> torch.Tensor:
        block = [MASK if word is None else word for word in (first, second)]
        ids = torch.tensor([[*PROMPT.tolist(), *block]])
        blocks = torch.tensor([0, 1, 1, 2, 2])  # the response starts a block of two
        mask = blocks[:, None] >= blocks[None, :]
        positions = torch.arange(5)[None]
        with torch.set_grad_enabled(requires_grad):
            logits = model.lm_head(hidden_states(model, ids, positions, mask[None, None]))[0, 3:].float()
            return logits[:, list(WORDS)].log_softmax(-1)

    return at


def outcomes(model, confidence: str, requires_grad: bool):
    """Every way in which two words are revealed one by one: (its probability, first place, words, log p of both)."""
    at = states_of(model, requires_grad)
    both = at(None, None)
    for drawn in itertools.product(range(3), range(3)):
        confidences = both.amax(1) if confidence == "max_probability" else both[[0, 1], list(drawn)]
        place = int(confidences.argmax())
        word = drawn[place]
        revealed = [WORDS[word] if i == place else None for i in (0, 1)]
        then = at(*revealed)[1 - place]
        for other in range(3):
            words = (WORDS[word], WORDS[other]) if place == 0 else (WORDS[other], WORDS[word])
            probability = (both[0, drawn[0]] + both[1, drawn[1]] + then[other]).exp()
            yield probability, place, words, both[place, word] + then[other]


def gradients(model, value: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("confidence", "is_unbiased"), [("max_probability", True), ("sampled", False)])
def test_the_expected_gradient(confidence, is_unbiased) -> None:
    """Two tokens, three words, no end token, A = R: all outcomes enumerated, each with the loss of this project."""
    model = tiny_model(34)
    truth = gradients(model, sum(p * REWARD[words] for p, _, words, _ in outcomes(model, confidence, True)))
    expected = torch.zeros_like(truth)
    for probability, place, words, _ in list(outcomes(model, confidence, False)):
        steps = [1, 2] if place == 0 else [2, 1]
        (t,), grid = two_words(model, words, steps)
        sample = ScoredTrajectory(t, PolicyTargets(REWARD[words]))
        rows = build_rows(sample, grid, OBJECTIVE, MASK, np.random.default_rng(0))
        module = DistillModule(model, OBJECTIVE, 4)
        loss, _ = module(pack(rows), gather_policy(rows, Draws(1.0, NEVER)), torch.ones(2))
        expected -= probability.detach() * gradients(model, loss)
    error = ((expected - truth).norm() / truth.norm()).item()
    assert (error < 1e-4) if is_unbiased else (error > 0.05), error


def two_words(model, words, steps):
    """A trajectory of these words with the log-probabilities that its states give them."""
    at = states_of(model, False)
    place = steps.index(1)
    revealed = [words[i] if i == place else None for i in (0, 1)]
    first, second = at(None, None)[place], at(*revealed)[1 - place]
    logprob = [0.0, 0.0]
    logprob[place], logprob[1 - place] = (
        float(first[WORDS.index(words[place])]),
        float(second[WORDS.index(words[1 - place])]),
    )
    how = DecodeSettings(2, "response", "low_confidence_static", temperature=1.0, ignore_eos=True, keep_logprobs=True)
    decoder = BlockDecoder(model, how, MASK, [EOS], 1, tokens=TokenIds(32, frozenset(NEVER) - {MASK, 31}))
    (t,), _ = decoder.decode([RolloutRequest(0, "test/0", PROMPT, 2, seed=0)])
    changed = replace(
        t,
        response_ids=np.array(words, dtype=np.int32),
        reveal_step=np.array(steps, dtype=np.int32),
        reveal_logprob=np.array(logprob, dtype=np.float32),
    )
    return [changed], decoder.grid


@pytest.mark.parametrize("confidence", ["max_probability", "sampled"])
def test_the_decoder_draws_as_the_enumeration_says(confidence) -> None:
    """Frequencies of the nine responses, by a chi-square statistic that a right decoder exceeds once in 10,000 runs."""
    model, count = tiny_model(34), 4000
    how = DecodeSettings(2, "response", "low_confidence_static", temperature=1.0, ignore_eos=True)
    how = replace(how, confidence=confidence, keep_logprobs=True)
    decoder = BlockDecoder(model, how, MASK, [EOS], 500, tokens=TokenIds(32, frozenset(NEVER) - {MASK, 31}))
    requests = [RolloutRequest(i, f"test/{i}", PROMPT, 2, seed=i) for i in range(count)]
    found = Counter(tuple(t.response_ids.tolist()) for t in decoder.decode(requests)[0])
    probability: Counter = Counter()
    for p, _, words, _ in outcomes(model, confidence, False):
        probability[words] += float(p)
    assert sum(probability.values()) == pytest.approx(1, abs=1e-5)
    statistic = sum((found[w] - count * p) ** 2 / (count * p) for w, p in probability.items())
    assert statistic < 31.8  # the 0.9999 quantile with 8 degrees of freedom
