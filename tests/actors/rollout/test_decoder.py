"""The cached, batched decoder equals the uncached oracle. `pytest tests/actors/rollout/test_decoder.py`"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.forward import StepShape
from opdlm.actors.rollout.remasking import STRATEGIES
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.form import PAPER_FORM, StudentForm
from tests.oracles import uncached_decode
from tests.tiny import EOS, FORMS_AND_GRIDS, MASK, OTHER_FAMILIES, request, tiny_model

MODELS = [*(tiny_model(seed) for seed in range(3)), *(tiny_model(3, **other) for other in OTHER_FAMILIES.values())]


@given(
    model=st.sampled_from(MODELS),
    block_size=st.integers(1, 6),
    form_and_grid=st.sampled_from(FORMS_AND_GRIDS),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    steps=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    lengths=st.lists(st.tuples(st.integers(1, 11), st.integers(1, 13)), min_size=1, max_size=7),
    batch_size=st.integers(1, 4),
    prefill_cost=st.sampled_from([0.5, 8.0]),
    narrowest=st.sampled_from([256, 4]),
    sorting=st.sampled_from([4, 0.1]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_equals_uncached_oracle(
    model,
    block_size,
    form_and_grid,
    strategy,
    steps,
    temperature,
    top_k,
    top_p,
    lengths,
    batch_size,
    prefill_cost,
    narrowest,
    sorting,
    seed,
) -> None:
    """Slots, their order and parts, refills, the cache and commits in the next forward change no token and no step."""
    form, grid = form_and_grid
    decode_settings = DecodeSettings(
        block_size=block_size,
        block_grid=grid,
        strategy=strategy,
        denoising_steps=min(steps, block_size),
        threshold=0.4,
        entropy_budget=1.0,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    requests = [request(p, i, limit, seed) for i, (p, limit) in enumerate(lengths)]
    # After a prompt of mask tokens alone all positions get equal logits, and rounding would decide between them.
    assume(all(set(r.prompt_ids) != {MASK} for r in requests))
    with (
        mock.patch("opdlm.actors.rollout.decoder._PREFILL_COST", prefill_cost),  # few slots free, or all
        mock.patch("opdlm.actors.rollout.attention.NARROWEST_PART", narrowest),
        mock.patch("opdlm.actors.rollout.attention.PART_COST", narrowest),
        mock.patch("opdlm.actors.rollout.slots._SORT_COST", sorting),
    ):
        decoder = BlockDecoder(model, decode_settings, MASK, [EOS], batch_size, form=form)
        trajectories, stats = decoder.decode(requests)
    for ours, asked in zip(trajectories, requests, strict=True):
        tokens, reveal = uncached_decode(model, decode_settings, MASK, {EOS}, asked, form=form)
        assert ours.response_ids.tolist() == tokens
        assert ours.reveal_step.tolist() == reveal
        assert MASK not in tokens
        assert 1 <= ours.response_length <= asked.max_new_tokens
        assert ours.denoising_steps == max(reveal)
    assert stats.response_tokens == sum(t.response_length for t in trajectories)
    assert stats.ended_by_eos == sum(t.finish_reason == "eos" for t in trajectories)


def test_recorded_forwards_of_few_shapes_decode_the_same(monkeypatch) -> None:
    """The recorder here works as CUDA graphs do: each shape has its own input memory and its own output memory."""
    monkeypatch.setattr("opdlm.actors.rollout.forward._NARROWEST_SHAPE", 16)
    shapes, replays = [], []

    def record(forward, inputs):
        shapes.append([tuple(tensor.shape) for tensor in inputs])
        output = torch.full_like(forward(*inputs), torch.nan)

        def replay() -> torch.Tensor:
            replays.append(len(inputs[0]))
            return output.copy_(forward(*inputs))

        return replay

    requests = [request(1 + 5 * i % 11, i, 1 + 7 * i % 29, seed=3) for i in range(40)]
    for decode_settings, form in (
        (DecodeSettings(threshold=0.4, temperature=1.0), PAPER_FORM),
        (DecodeSettings(strategy="low_confidence_static", block_grid="response"), PAPER_FORM),
        (DecodeSettings(block_grid="response", threshold=0.4), StudentForm(True, "causal")),
    ):
        plain, recording = (
            BlockDecoder(MODELS[1], decode_settings, MASK, [EOS], 9, recorder, form=form)
            for recorder in (None, lambda: record)
        )
        for asked in (requests, requests[:3], requests[5:]):  # the second uses fewer slots; the third needs a new cache
            (expected, stats), (ours, recorded) = plain.decode(asked), recording.decode(asked)
            for one, other in zip(expected, ours, strict=True):
                assert one.response_ids.tolist() == other.response_ids.tolist()
                assert one.reveal_step.tolist() == other.reveal_step.tolist()
            assert (stats.forwards, stats.forward_tokens) == (recorded.forwards, recorded.forward_tokens)
    assert len(replays) > 2 * len(shapes), "most forwards are replays"


@given(st.integers(1, 70), st.data())
def test_shapes_are_few_and_large_enough(slots, data) -> None:
    """A rounded-up shape is never larger than the cache."""
    positions = data.draw(st.integers(16, 5000))
    occupied, width = data.draw(st.integers(1, slots)), data.draw(st.integers(1, positions))
    exact = StepShape(data.draw(st.integers(0, occupied)), occupied, width)
    rounded = exact.rounded_up(slots, positions)
    assert exact.slots <= rounded.slots <= min(max(2 * exact.slots, 1), slots)
    assert exact.commits <= rounded.commits <= rounded.slots
    assert (rounded.commits == 0) == (exact.commits == 0)
    assert width <= rounded.width <= positions
    all_shapes = {
        StepShape(c, n, width).rounded_up(slots, positions) for n in range(1, slots + 1) for c in range(n + 1)
    }
    assert len(all_shapes) <= 5 * (1 + slots.bit_length())


def test_a_call_is_not_affected_by_the_one_before() -> None:
    """The decoder uses its cache again for fewer or shorter sequences, and makes a new one for longer sequences."""
    decode_settings, model = DecodeSettings(), MODELS[0]
    decoder = BlockDecoder(model, decode_settings, MASK, [EOS], 4)
    for lengths, limit in (([9, 4, 11, 7], 16), ([3, 6, 2, 5], 6), ([5, 2], 8), ([10, 12, 13, 8], 24)):
        requests = [request(length, index, limit) for index, length in enumerate(lengths)]
        for ours, asked in zip(decoder.decode(requests)[0], requests, strict=True):
            assert ours.response_ids.tolist() == uncached_decode(model, decode_settings, MASK, {EOS}, asked)[0]


def test_block_size_one_is_autoregressive_decoding() -> None:
    """With blocks of one token: append a mask, run the plain causal model, take the last position's best token."""
    model, limit = MODELS[0], 10
    asked = request(5, limit=limit)
    ids = asked.prompt_ids.tolist()
    for _ in range(limit):
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, MASK]])).logits[0, -1]
        logits[MASK] = float("-inf")
        ids.append(int(logits.argmax()))
        if ids[-1] == EOS:
            break
    (ours,), _ = BlockDecoder(model, DecodeSettings(block_size=1), MASK, [EOS], 1).decode([asked])
    assert ours.response.tolist() == ids[5:]


def test_forwards_equal_denoising_steps() -> None:
    """The next block's first forward commits a block, so one sequence needs exactly one forward per denoising step."""
    decode_settings = DecodeSettings(strategy="low_confidence_static", ignore_eos=True)
    _, stats = BlockDecoder(MODELS[0], decode_settings, MASK, [EOS], 1).decode([request(6, limit=14)])
    assert stats.forwards == stats.denoising_steps == 14


def test_result_does_not_depend_on_the_batch() -> None:
    """Sampling is seeded per sequence: alone or in any batch, a request decodes to the same tokens."""
    decode_settings = DecodeSettings(strategy="random", temperature=1.0, top_p=0.9)
    requests = [request(3 + i % 5, i) for i in range(9)]
    together, _ = BlockDecoder(MODELS[1], decode_settings, MASK, [EOS], 4).decode(requests)
    for asked, ours in zip(requests, together, strict=True):
        (alone,), _ = BlockDecoder(MODELS[1], decode_settings, MASK, [EOS], 1).decode([asked])
        assert alone.response_ids.tolist() == ours.response_ids.tolist()
        assert alone.reveal_step.tolist() == ours.reveal_step.tolist()


def test_limit_is_never_exceeded_and_last_block_is_kept_whole() -> None:
    decode_settings = DecodeSettings(ignore_eos=True)
    for limit in range(1, 9):
        (ours,), _ = BlockDecoder(MODELS[0], decode_settings, MASK, [EOS], 1).decode([request(6, limit=limit)])
        assert ours.response_length == limit
        assert ours.finish_reason == "length"
        assert (6 + len(ours.response_ids)) % 4 == 0


def test_threshold_of_the_request_overrides_the_settings() -> None:
    """A request carries the curriculum's threshold, which overrides the decoder's."""
    decode_settings = DecodeSettings(threshold=1.0, ignore_eos=True)
    asked = request(4, limit=16)
    loose = asked.__class__(0, "loose", asked.prompt_ids, 16, 0, threshold=0.0)
    (strict,), _ = BlockDecoder(MODELS[0], decode_settings, MASK, [EOS], 1).decode([asked])
    (quick,), _ = BlockDecoder(MODELS[0], decode_settings, MASK, [EOS], 1).decode([loose])
    assert strict.denoising_steps == 16
    assert quick.denoising_steps == 4


@pytest.mark.parametrize(
    ("length", "limit", "message"), [(0, 4, "is empty"), (3, 0, "at least 1"), (120, 8, "the model's context is 128")]
)
def test_impossible_requests_are_refused_by_name(length, limit, message) -> None:
    asked = request(length, limit=limit)
    if length == 120:
        asked = request(121, limit=8)
    with pytest.raises(ValueError, match=message) as caught:
        BlockDecoder(MODELS[0], DecodeSettings(), MASK, [EOS], 1).decode([asked])
    assert "test/0" in str(caught.value)


def test_several_end_tokens() -> None:
    """Any of the end tokens ends a response (Qwen3 has two)."""
    (plain,), _ = BlockDecoder(MODELS[0], DecodeSettings(ignore_eos=True), MASK, [EOS], 1).decode([request(4)])
    stop = int(plain.response[3])
    (ours,), _ = BlockDecoder(MODELS[0], DecodeSettings(), MASK, [EOS, stop], 1).decode([request(4)])
    first = np.flatnonzero(np.isin(plain.response, [EOS, stop]))[0]
    assert ours.response_length == first + 1
    assert ours.finish_reason == "eos"


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("block_size", [4, 8])
def test_a_response_that_is_known_ends_the_sequence(strategy, block_size) -> None:
    """Without what is behind the end token in its block: the same response in the same steps, in fewer forwards."""
    ends = [EOS, 5, 6, 7]
    requests = [request(1 + i % 7, i, 24, seed=3) for i in range(40)]
    whole = DecodeSettings(block_size, strategy=strategy, threshold=0.4, entropy_budget=1.0, temperature=1.0)
    expected, slow = BlockDecoder(MODELS[0], whole, MASK, ends, 8).decode(requests)
    early, fast = BlockDecoder(MODELS[0], replace(whole, finish_blocks=False), MASK, ends, 8).decode(requests)
    for one, other in zip(expected, early, strict=True):
        length = one.response_length
        assert other.response.tolist() == one.response.tolist()
        assert other.reveal_step.tolist()[:length] == one.reveal_step.tolist()[:length]
        if one.finish_reason == "eos":
            assert other.denoising_steps == max(one.reveal_step[:length])
        assert other.finish_reason == one.finish_reason
        assert 0 not in other.reveal_step
    assert sum(t.finish_reason == "eos" for t in early) > 20
    pairs = zip(early, expected, strict=True)
    assert any(len(cut.response_ids) == cut.response_length < len(kept.response_ids) for cut, kept in pairs)
    assert fast.denoising_steps < slow.denoising_steps
    assert fast.response_tokens == slow.response_tokens
