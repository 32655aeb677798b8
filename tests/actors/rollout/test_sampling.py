"""Candidate tokens and remasking strategies. `pytest tests/actors/rollout/test_sampling.py`"""

from __future__ import annotations

import pytest
import torch

from opdlm.actors.rollout.remasking import STRATEGIES, DenoisingStep, entropy_of
from opdlm.actors.rollout.sampling import draw_candidates, filter_logits, hashed_uniform


def test_hashed_uniform_is_uniform_and_independent() -> None:
    seeds, positions = torch.arange(300)[:, None], torch.arange(300)[None]
    u = hashed_uniform(seeds, positions, 0)
    assert u.shape == (300, 300)
    assert 0.0 <= float(u.min()) < float(u.max()) < 1.0
    histogram = torch.histc(u.float(), bins=20, min=0, max=1) / u.numel()
    assert (histogram - 0.05).abs().max() < 0.003
    for other in (hashed_uniform(seeds, positions, 1), hashed_uniform(seeds + 1, positions, 0), u.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.02
    assert torch.equal(hashed_uniform(seeds, positions, torch.tensor(3)), hashed_uniform(seeds, positions, 3))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature) -> None:
    logits = torch.tensor([2.0, 0.0, float("-inf"), 1.0, -1.0])
    u = hashed_uniform(torch.arange(40_000), 7)
    drawn = draw_candidates(logits.expand(40_000, -1), u, temperature)
    frequency = torch.bincount(drawn, minlength=5) / 40_000
    torch.testing.assert_close(frequency, (logits / temperature).softmax(-1), atol=0.01, rtol=0)
    assert frequency[2] == 0


def test_zero_temperature_is_greedy() -> None:
    logits = torch.randn(50, 9)
    for uniform in (torch.rand(50).double(), None):
        assert torch.equal(draw_candidates(logits, uniform, 0.0), logits.argmax(-1))


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [float("-inf"), 1.0, 1.0]])
    assert draw_candidates(logits, None, 0.0).tolist() == [1, 1]


def test_extreme_uniforms_never_draw_a_filtered_token() -> None:
    logits = torch.full((2, 6), float("-inf"))
    logits[:, 2:4] = 0.0
    drawn = draw_candidates(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert drawn.tolist() == [2, 3]


def test_filters() -> None:
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    kept = lambda x: torch.isfinite(x).tolist()  # noqa: E731
    assert kept(filter_logits(logits, 2, 1.0)) == [True, True, False, False, False]
    assert kept(filter_logits(logits, 0, 0.6)) == [True, True, False, False, False]
    assert kept(filter_logits(logits, 0, 0.01)) == [True, False, False, False, False]
    assert kept(filter_logits(logits, 0, 0.0)) == [True, False, False, False, False]
    assert kept(filter_logits(logits, 0, 1.0)) == [True] * 5
    assert kept(filter_logits(logits, 3, 0.8)) == [True, True, False, False, False] or kept(
        filter_logits(logits, 3, 0.8)
    ) == [True, True, True, False, False]


def _step(
    confidence: list[float], masked: list[bool], count: int, logits: torch.Tensor | None = None, **more
) -> DenoisingStep:
    """One step of one block of four positions."""
    options = {"threshold": torch.tensor([0.9]), "entropy_budget": 0.0} | more
    return DenoisingStep(
        masked=torch.tensor([masked]),
        confidence=torch.tensor([confidence]),
        static_count=torch.tensor([count]),
        entropy=lambda: entropy_of(torch.zeros(1, len(masked), 4) if logits is None else logits[None]),
        noise=lambda: torch.tensor([[0.3, 0.9, 0.1, 0.5]], dtype=torch.float64),
        **options,
    )


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("low_confidence_static", [False, False, True, True]),
        ("low_confidence_dynamic", [True, False, True, True]),
        ("sequential", [True, False, True, False]),
        ("sequential_dynamic", [True, False, True, True]),
        ("random", [True, False, False, True]),
    ],
)
def test_strategies(strategy, expected) -> None:
    """Position 1 is revealed already; the static count is two; three confidences are above the threshold."""
    step = _step([0.91, 0.99, 0.95, 0.96], [True, False, True, True], 2)
    assert STRATEGIES[strategy](step)[0].tolist() == expected


def test_dynamic_reveals_at_least_the_static_count() -> None:
    step = _step([0.1, 0.2, 0.3, 0.4], [True] * 4, 1)
    assert STRATEGIES["low_confidence_dynamic"](step)[0].tolist() == [False, False, False, True]
    assert STRATEGIES["sequential_dynamic"](step)[0].tolist() == [True, False, False, False]
    later = _step([0.1, 0.2, 0.3, 0.95], [False, True, True, True], 1)
    assert STRATEGIES["sequential_dynamic"](later)[0].tolist() == [False, True, False, True]


def test_entropy_bounded_takes_rising_entropies_within_the_budget() -> None:
    logits = torch.zeros(4, 4)
    for i, peak in enumerate([9.0, 2.0, 5.0, 20.0]):
        logits[i, 0] = peak
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    masked = [True, True, True, False]
    reveal = lambda budget: STRATEGIES["entropy_bounded"](  # noqa: E731
        _step([0.5] * 4, masked, 1, logits, entropy_budget=budget)
    )[0].tolist()
    assert reveal(0.0) == [True, False, False, False]
    assert reveal(float(entropy[0] + entropy[2]) + 1e-6) == [True, False, True, False]
    assert reveal(100.0) == masked


def test_entropy_with_an_impossible_token_is_not_nan() -> None:
    logits = torch.zeros(4, 4)
    logits[:, 3] = float("-inf")
    assert STRATEGIES["entropy_bounded"](_step([0.5] * 4, [True] * 4, 1, logits))[0].sum() == 1
