"""The decoder as an engine: requests come between any two steps. `pytest tests/actors/rollout/test_engine.py`"""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.actors.rollout.settings import DecodeSettings
from tests.oracles import uncached_decode
from tests.tiny import EOS, FORMS_AND_GRIDS, MASK, request, tiny_model

MODEL = tiny_model(1)
_ARRIVAL = st.tuples(st.integers(0, 6), st.integers(1, 30), st.integers(1, 13))  # steps before it, prompt, limit


@given(
    arrivals=st.lists(_ARRIVAL, min_size=1, max_size=9),
    slots=st.integers(1, 4),
    form_and_grid=st.sampled_from(FORMS_AND_GRIDS),
    cache_tokens=st.sampled_from([None, 48, 90]),
)
@settings(max_examples=40)
def test_requests_that_come_at_any_time_decode_as_if_each_were_alone(
    arrivals, slots, form_and_grid, cache_tokens
) -> None:
    """Whatever the arrivals, and whatever memory grows while others are decoded, no token and no step changes."""
    form, grid = form_and_grid
    how = DecodeSettings(block_grid=grid, threshold=0.4)
    cache = SlotCache(MODEL, cache_tokens)
    decoder = BlockDecoder(MODEL, how, MASK, [EOS], slots, form=form, cache=cache)
    requests, ended = {}, {}
    for index, (steps, prompt, limit) in enumerate(arrivals):
        for _ in range(steps):
            ended |= {t.index: t for t in decoder.step()}
            assert decoder.occupied <= slots
        requests[index] = request(prompt, index, limit)
        decoder.add([requests[index]])
        assert cache_tokens or decoder.room == slots - decoder.occupied - decoder.waiting
    # After a prompt of mask tokens alone all positions get equal logits, and rounding would decide between them.
    assume(all(set(asked.prompt_ids) != {MASK} for asked in requests.values()))
    while decoder.occupied or decoder.waiting:
        ended |= {t.index: t for t in decoder.step()}
    assert decoder.step() == []
    assert sorted(ended) == sorted(requests)
    for index, asked in requests.items():
        tokens, reveal = uncached_decode(MODEL, how, MASK, {EOS}, asked, form=form)
        assert ended[index].response_ids.tolist() == tokens
        assert ended[index].reveal_step.tolist() == reveal


def test_a_request_that_does_not_fit_leaves_the_engine_as_it_was() -> None:
    decoder = BlockDecoder(MODEL, DecodeSettings(), MASK, [EOS], 2)
    decoder.add([request(3)])
    with pytest.raises(ValueError, match="the model's context is 128"):
        decoder.add([request(4, 1), request(121, 2, 8)])
    assert (decoder.waiting, decoder.occupied, decoder.room) == (1, 0, 1)
    decoder.clear()
    assert (decoder.waiting, decoder.occupied, decoder.room) == (0, 0, 2)
