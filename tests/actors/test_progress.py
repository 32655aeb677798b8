"""How far a call of an actor has come. `pytest tests/actors/test_progress.py`"""

from __future__ import annotations

import itertools

import numpy as np

from opdlm.actors.progress import CallProgress
from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.generation import generate
from opdlm.actors.teacher.scoring import score
from tests.tiny import EOS, MASK, request, tiny_model

MODEL = tiny_model(3)
LIMITS = (9, 3, 14, 6, 11)


def test_a_decoder_says_how_far_it_is_and_decodes_as_if_it_did_not() -> None:
    requests = [request(2 + i, i, limit) for i, limit in enumerate(LIMITS)]
    for settings in (DecodeSettings(ignore_eos=True), DecodeSettings(threshold=0.3), DecodeSettings(block_size=3)):
        plain, stats = BlockDecoder(MODEL, settings, MASK, [EOS], 2).decode(requests)
        decoder, seen = BlockDecoder(MODEL, settings, MASK, [EOS], 2), []
        watched, same = decoder.decode(requests, update_weights=lambda d=decoder, s=seen: s.append(d.progress()))
        assert [t.response_ids.tolist() for t in watched] == [t.response_ids.tolist() for t in plain]
        assert (same.denoising_steps, same.forwards) == (stats.denoising_steps, stats.forwards)
        assert len(seen) == stats.forwards
        assert seen[0] == CallProgress((), 0)
        assert all(set(a.finished) <= set(b.finished) for a, b in itertools.pairwise(seen))
        assert 3 <= len(seen[-1].finished) < 5
        lengths = {t.index: t.response_length for t in plain}
        for progress in seen:
            done = sum(lengths[index] for index in progress.finished)
            open_ = [limit for index, limit in enumerate(LIMITS) if index not in progress.finished]
            assert done <= progress.tokens <= done + sum(sorted(open_)[-2:])
        assert decoder.progress() == CallProgress((), 0), "nothing is kept of a call that has ended"
    steps = [b.tokens - a.tokens for a, b in itertools.pairwise(seen)]
    assert max(steps) > 0


def test_scoring_and_generation_tell_of_each_batch() -> None:
    trajectories, _ = BlockDecoder(MODEL, DecodeSettings(), MASK, [EOS], 4).decode([request(3, i, 6) for i in range(5)])
    told: list[list[int]] = []
    score(MODEL, trajectories, "hidden", 0, batch_tokens=16, on_batch=lambda places: told.append(list(places)))
    assert len(told) > 1
    assert sorted(place for places in told for place in places) == list(range(5))
    told.clear()
    prompts = [request(2 + i).prompt_ids for i in range(5)]
    watched = generate(MODEL, prompts, 4, [EOS], 2, on_batch=lambda places: told.append(list(places)))
    assert list(map(len, told)) == [2, 2, 1]
    assert sorted(place for places in told for place in places) == list(range(5))
    unwatched = generate(MODEL, prompts, 4, [EOS], 2)
    assert all(np.array_equal(a, b) for a, b in zip(watched, unwatched, strict=True))
