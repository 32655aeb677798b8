"""A cache that sequences share: places, windows, waiting, putting back. `pytest tests/actors/rollout/test_cache.py`"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opdlm.actors.rollout import slots as slots_module
from opdlm.actors.rollout.attention import PART_COST, cost, parts_of
from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.kv_cache import SPARE, SlotCache
from opdlm.actors.rollout.places import LEAST_SLACK, arrange, widths_of
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.slots import Slots
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from tests.oracles import uncached_decode
from tests.tiny import EOS, FORMS_AND_GRIDS, MASK, request, tiny_model

MODEL = tiny_model(1)
_LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 13)), min_size=1, max_size=9)


@given(
    lengths=_LENGTHS,
    slots=st.integers(1, 5),
    spare=st.integers(0, 60),
    form_and_grid=st.sampled_from(FORMS_AND_GRIDS),
    part_cost=st.sampled_from([1, 256]),
    sort_cost=st.sampled_from([4, 0.1]),
    records=st.booleans(),
    temperature=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=50)
def test_a_bounded_cache_changes_no_token(
    lengths, slots, spare, form_and_grid, part_cost, sort_cost, records, temperature
) -> None:
    """From a cache that holds just the longest request: who waits, moves or is put back decodes to the same tokens."""
    form, grid = form_and_grid
    how = DecodeSettings(block_grid=grid, threshold=0.4, temperature=temperature)
    requests = [request(prompt, index, limit) for index, (prompt, limit) in enumerate(lengths)]
    assume(all(set(r.prompt_ids) != {MASK} for r in requests))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NARROWEST_PART", "PART_COST"):
            patch.setattr(f"opdlm.actors.rollout.attention.{name}", part_cost)
        patch.setattr("opdlm.actors.rollout.slots._SORT_COST", sort_cost)
        make_recorder = (lambda: lambda forward, inputs: lambda: forward(*inputs)) if records else None
        free = BlockDecoder(MODEL, how, MASK, [EOS], slots, make_recorder, form=form)
        longest = max(free.grid.end_position(r.prompt_ids.size, r.max_new_tokens) for r in requests)
        cache = SlotCache(MODEL, longest + spare)
        decoder = BlockDecoder(MODEL, how, MASK, [EOS], slots, make_recorder, form=form, cache=cache)
        decoder.add(requests)
        ended, addresses = {}, [t.data_ptr() for layer in cache.layers for t in layer]
        for _ in range(2000):
            ended |= {t.index: t for t in decoder.step()}
            assert decoder.live_tokens - 4 * decoder.occupied <= cache.positions == longest + spare
            assert decoder.room >= 0 or decoder.waiting
            if not decoder.occupied and not decoder.waiting:
                break
    assert [t.data_ptr() for layer in cache.layers for t in layer] == addresses, "nothing was allocated"
    assert sorted(ended) == list(range(len(requests)))
    for asked in requests:
        tokens, reveal = uncached_decode(MODEL, how, MASK, {EOS}, asked, form=form)
        assert ended[asked.index].response_ids.tolist() == tokens
        assert ended[asked.index].reveal_step.tolist() == reveal


def test_the_sequence_that_began_last_is_put_back() -> None:
    """Two sequences of 60 positions in a cache of 64: both begin, and the first one ends first."""
    how = DecodeSettings(strategy="low_confidence_static", ignore_eos=True)
    decoder = BlockDecoder(MODEL, how, MASK, [EOS], 2, cache=SlotCache(MODEL, 64))
    decoder.add([request(4, 0, limit=56), request(4, 1, limit=56)])
    ended = []
    while not ended:
        ended = decoder.step()
        most = max(decoder.occupied, 1)
    assert [t.index for t in ended] == [0]
    assert (most, decoder.put_back, decoder.waiting) == (1, 1, 1), "it waits until another one has ended"
    while decoder.waiting or decoder.occupied:
        ended += decoder.step()
    assert decoder.put_back == 1
    for ours in ended:
        assert ours.response_ids.tolist() == uncached_decode(MODEL, how, MASK, set(), request(4, ours.index, 56))[0]


def test_one_long_prompt_beside_short_ones_takes_its_own_length_only() -> None:
    """The context of 512 beside 31 short sequences: they all decode at once, in less than an eighth of 32 x 512."""
    model = tiny_model(2, context=512)
    how = DecodeSettings(threshold=0.4, ignore_eos=True)
    asked = [request(500, 0, limit=12), *(request(4, i, limit=12) for i in range(1, 32))]
    cache = SlotCache(model)
    decoder = BlockDecoder(model, how, MASK, [EOS], 32, cache=cache)
    trajectories, _ = decoder.decode(asked)
    for ours in (trajectories[0], trajectories[1], trajectories[31]):
        assert ours.response_ids.tolist() == uncached_decode(model, how, MASK, set(), asked[ours.index])[0]
    assert cache.positions <= 512 + 31 * 16 < 32 * 512 / 8


@pytest.mark.parametrize("limit", [None, 80])
def test_decoders_share_a_cache(limit) -> None:
    """An evaluation in the middle of other sequences: they go on as if nothing had been."""
    how = DecodeSettings(threshold=0.4, ignore_eos=True)
    cache = SlotCache(MODEL, limit)
    training = BlockDecoder(MODEL, how, MASK, [EOS], 3, cache=cache)
    evaluation = BlockDecoder(MODEL, how.greedy("sequential"), MASK, [EOS], 7, cache=cache)
    asked = [request(5 + 3 * i, i, limit=20) for i in range(3)]
    training.add(asked)
    ended = [t for _ in range(9) for t in training.step()]
    other = [request(6, 50 + i, limit=16) for i in range(7)]
    for ours, wanted in zip(evaluation.decode(other)[0], other, strict=True):
        assert ours.response_ids.tolist() == uncached_decode(MODEL, evaluation.settings, MASK, set(), wanted)[0]
    while training.occupied or training.waiting:
        ended += training.step()
    assert len(ended) == 3
    for ours in ended:
        assert ours.response_ids.tolist() == uncached_decode(MODEL, how, MASK, set(), asked[ours.index])[0]


def test_a_request_that_the_cache_cannot_hold_is_refused_by_name() -> None:
    decoder = BlockDecoder(MODEL, DecodeSettings(), MASK, [EOS], 2, cache=SlotCache(MODEL, 31))
    decoder.add([request(19, 0, limit=9)])
    with pytest.raises(ValueError, match=r"prompt test/1: 20 prompt tokens .* take 32 .*rollout.cache_tokens is 31"):
        decoder.add([request(19, 0, limit=9), request(20, 1, limit=9)])
    assert (decoder.waiting, decoder.room) == (1, 0)


def test_room_counts_what_the_cache_can_hold() -> None:
    decoder = BlockDecoder(MODEL, DecodeSettings(ignore_eos=True), MASK, [EOS], 8, cache=SlotCache(MODEL, 92))
    assert decoder.room == 8, "no prompt is known yet"
    decoder.add([request(16, 0, limit=8)])  # 20 positions to begin with
    assert decoder.room == 3
    decoder.add([request(16, i, limit=8) for i in (1, 2, 3, 4)])
    assert decoder.room == 0
    decoder.step()
    assert (decoder.occupied, decoder.waiting) == (4, 1)


def test_after_broken_weights_the_cache_holds_no_nan() -> None:
    """Their keys and values stay behind masks, where 0 times NaN would be NaN for whoever comes next."""
    model, how = copy.deepcopy(MODEL), DecodeSettings(ignore_eos=True)
    good = model.state_dict()["model.layers.0.self_attn.v_proj.weight"].clone()
    decoder = BlockDecoder(model, how, MASK, [EOS], 4)
    model.model.layers[0].self_attn.v_proj.weight.data.fill_(torch.nan)
    with pytest.raises(OpdlmError, match="NaN or infinity"):
        decoder.decode([request(40, i, limit=20) for i in range(4)])
    model.model.layers[0].self_attn.v_proj.weight.data.copy_(good)
    asked = [request(3 + i, i, limit=8) for i in range(4)]
    for ours, wanted in zip(decoder.decode(asked)[0], asked, strict=True):
        assert ours.response_ids.tolist() == uncached_decode(MODEL, how, MASK, set(), wanted)[0]


@given(st.data())
def test_places_hold_what_they_need_and_no_two_overlap(data) -> None:
    """After any growth, places are disjoint, in the order of the slots and inside the cache; or they cannot fit."""
    n = data.draw(st.integers(1, 12))
    needs = np.array(data.draw(st.lists(st.integers(1, 300), min_size=n, max_size=n)))
    limits = needs + np.array(data.draw(st.lists(st.integers(0, 300), min_size=n, max_size=n)))
    room = data.draw(st.integers(int(limits.max()), 4000))
    bases, widths = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    for _ in range(4):
        new = arrange(bases, widths, needs, limits, room, LEAST_SLACK, data.draw(st.booleans()))
        if new is None:
            assert widths_of(needs, limits, room) is None
            assert n > 1
            return
        assert sorted(new.order) == list(range(new.first, n))
        needs, limits = (np.concatenate([old[: new.first], old[new.order]]) for old in (needs, limits))
        bases, widths = np.append(bases[: new.first], new.bases), np.append(widths[: new.first], new.widths)
        assert (needs <= widths).all()
        assert (widths <= limits).all()
        assert (bases[1:] >= bases[:-1] + widths[:-1]).all()
        assert bases[-1] + widths[-1] <= room
        needs = np.minimum(needs + np.array(data.draw(st.lists(st.integers(0, 90), min_size=n, max_size=n))), limits)


def test_a_full_cache_is_full_of_tokens() -> None:
    """The tightest places are a sixteenth longer than their sequences, so a full cache is at most 7 % larger."""
    needs = np.random.default_rng(0).integers(200, 4000, 64)
    widths = widths_of(needs, needs + 4000, int(1.07 * needs.sum()))
    assert widths is not None
    assert widths.sum() <= 1.07 * needs.sum()


@given(st.data())
def test_windows_show_every_slot_its_positions(data) -> None:
    """Each slot's positions are inside its window, and each window is inside the cache."""
    n = data.draw(st.integers(1, 40))
    widths = np.array(data.draw(st.lists(st.integers(1, 3000), min_size=n, max_size=n)))
    if data.draw(st.booleans()):
        widths = np.sort(widths)[::-1]
    ends = np.array([data.draw(st.integers(1, int(width))) for width in widths])
    bases = np.cumsum(widths) - widths
    positions = int(widths.sum()) + SPARE
    parts = parts_of(bases, ends, positions)
    starts = [part.begin + k * part.stride for part in parts for k in range(part.count)]
    reach = [part.width for part in parts for _ in range(part.count)]
    assert len(starts) == n
    for start, width, base, end in zip(starts, reach, bases, ends, strict=True):
        assert 0 <= start <= base
        assert base + end <= start + width <= positions
    alone = sum(cost(parts_of(bases[i : i + 1], ends[i : i + 1], positions)) for i in range(n))
    assert cost(parts) <= 1.2 * alone


def test_equal_sequences_are_one_part_and_one_long_one_is_another() -> None:
    equal = np.full(32, 190)
    (part,) = parts_of(np.arange(32) * 192, equal, 32 * 192 + SPARE)
    assert (part.stride, part.count, part.width) == (192, 32, 192)
    ends = np.array([4000] + [100] * 31)
    parts = parts_of(np.cumsum(ends) - ends, ends, int(ends.sum()) + SPARE)
    assert [part.count for part in parts] == [1, 31]


def test_many_lengths_need_few_parts() -> None:
    """64 sorted sequences of lognormal length: few calls, which read little more than each sequence."""
    ends = np.sort(np.random.default_rng(0).lognormal(np.log(500), 1, 64).astype(int) + 64)[::-1]
    parts = parts_of(np.cumsum(ends) - ends, ends, int(ends.sum()) + SPARE)
    assert len(parts) <= 16
    assert cost(parts) - PART_COST * len(parts) <= 1.35 * ends.sum()


def test_slots_are_sorted_only_if_their_order_costs_more_than_sorting(monkeypatch) -> None:
    """Sorting reads the cache too, so it waits until the unsorted order has cost as much as sorting."""
    for name in ("NARROWEST_PART", "PART_COST"):
        monkeypatch.setattr(f"opdlm.actors.rollout.attention.{name}", 16)
    moves: list[int] = []
    move = SlotCache.move

    def recorded(cache: SlotCache, old: np.ndarray, new: np.ndarray, lengths: np.ndarray) -> None:
        moves.append(int(lengths[old != new].sum()))
        move(cache, old, new, lengths)

    monkeypatch.setattr(SlotCache, "move", recorded)
    how = DecodeSettings(strategy="low_confidence_static", ignore_eos=True)
    for sort_cost, moved in ((0.1, True), (1e6, False)):
        moves.clear()
        monkeypatch.setattr(slots_module, "_SORT_COST", sort_cost)
        decoder = BlockDecoder(MODEL, how, MASK, [EOS], 3, cache=SlotCache(MODEL, 3 * 120))
        ended = []
        for index, prompt in enumerate((3, 70, 5)):  # each takes the place behind the ones before
            decoder.add([request(prompt, index, 20)])
            ended += decoder.step()
        while decoder.occupied or decoder.waiting:
            ended += decoder.step()
        assert any(moves) == moved
        for ours in ended:
            asked = request((3, 70, 5)[ours.index], ours.index, 20)
            assert ours.response_ids.tolist() == uncached_decode(MODEL, how, MASK, set(), asked)[0]


def test_a_sort_that_finds_no_room_puts_nothing_back() -> None:
    """Four slots fill the cache in an order that wastes much attention; sorted, they would need more room."""
    nothing = torch.zeros(0, 0)
    slots, ends = Slots(4, MASK, nothing, nothing, 0), np.array([300, 4000, 300, 4000])
    slots.enlarge(4, 8192)
    slots.refill([request(int(end) - 4, i, 4192) for i, end in enumerate(ends)], BlockGrid(4, "response"), 0.9)
    moved: list[int] = []
    cache = SimpleNamespace(positions=int((ends + 20).sum()), move=lambda *of: moved.append(1))
    slots._widths[:4] = ends + 20
    slots._bases[:4] = np.cumsum(ends + 20) - (ends + 20)
    assert all(slots.arrange(cache, 1 / 16, sorts=True) for _ in range(400))
    assert not moved
    assert slots._wasted > slots_module._SORT_COST * ends.sum(), "a sort is due"
