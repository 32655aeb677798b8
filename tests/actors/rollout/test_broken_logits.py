"""Logits that no token can be drawn from, and rows that are never drawn.

`pytest tests/actors/rollout/test_broken_logits.py`
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.remasking import STRATEGIES
from opdlm.actors.rollout.sampling import draw_candidates
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.generation import generate
from opdlm.actors.teacher.scoring import score
from opdlm.common.errors import OpdlmError
from opdlm.common.token_ids import TokenIds
from tests.tiny import EOS, MASK, VOCABULARY, request, tiny_model, trajectory

NAN, INFINITY = float("nan"), float("inf")
TOKENS = TokenIds(20, frozenset([7, 11]))


def decode(model, count: int = 3, **settings):
    decoder = BlockDecoder(model, DecodeSettings(**settings), MASK, [EOS], 4, tokens=TOKENS)
    return decoder.decode([request(4 + i, i, vocab=20) for i in range(count)], weight_version=5)[0]


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_broken_model_gives_an_error_and_no_response(value, temperature, strategy) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(
        OpdlmError, match=r"prompt test/0: the student's logits hold NaN or infinity \(weights of ver.* 5"
    ):
        decode(model, temperature=temperature, strategy=strategy)


def test_a_distribution_without_a_token_is_an_error() -> None:
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *called: torch.full_like(called[-1], -INFINITY))
    with pytest.raises(OpdlmError, match="so no token can be drawn"):
        decode(model)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-38, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("filters", [{}, {"top_k": 31}, {"top_p": 0.999}])
def test_whatever_the_logits_only_tokens_are_drawn(temperature, filters) -> None:
    """The rows that no token has are by far the likeliest, and the mask token too."""
    model = tiny_model()
    others = [*TOKENS.others(VOCABULARY)]
    with torch.no_grad():
        model.lm_head.weight[others] *= 50
    for strategy in STRATEGIES:
        for made in decode(model, temperature=temperature, strategy=strategy, **filters):
            assert all(int(token) in TOKENS for token in made.response_ids)


def test_the_largest_uniform_number_draws_a_candidate() -> None:
    """Its product with the total rounds up to the total, behind which only tokens of probability 0 are."""
    logits = torch.randn(4000, 9)
    logits[:, [0, 5, 7, 8]] = -INFINITY
    for temperature in (0.7, 1.0, 3.0):
        for uniform in (0.0, 1 - 2.0**-53):
            drawn = draw_candidates(logits, torch.full((4000,), uniform, dtype=torch.float64), temperature)
            assert set(drawn.tolist()) <= {1, 2, 3, 4, 6}


def test_a_broken_teacher_gives_an_error_and_no_target() -> None:
    model, sample = tiny_model(1), trajectory([5, 6], [7, 8], [1, 2])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = NAN
    for kind in ("hidden", "topk", "logits"):
        with pytest.raises(OpdlmError, match=r"teacher: its hidden states of sample 0 \(test/0\) hold NaN"):
            score(model, [sample], kind, 4, 64)
    for temperature in (0.0, 1.0):
        with pytest.raises(OpdlmError, match="the model's logits hold NaN or infinity at position 1"):
            generate(model, [np.array([5, 6], np.int32)], 4, [EOS], 1, temperature)
