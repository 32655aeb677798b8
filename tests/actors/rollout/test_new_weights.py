"""Sequences that go on with new weights (`on_new_weights: continue`).

`pytest tests/actors/rollout/test_new_weights.py`
"""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opdlm.actors.rollout.actor import RolloutActor, start_rollout_actor
from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.observation import StepObservation
from opdlm.actors.rollout.remasking import STRATEGIES
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import load_model
from opdlm.common.types import RolloutRequest, Trajectory, WeightHandle
from opdlm.common.weights import WeightPacker
from tests.oracles import uncached_decode
from tests.patience import PATIENCE
from tests.tiny import EOS, FORMS_AND_GRIDS, MASK, request, tiny_model

MODELS = [tiny_model(seed) for seed in range(20, 23)]
SETTINGS = DecodeSettings(strategy="low_confidence_static", ignore_eos=True)


class WeightUpdates:
    """Loads the weights of other models into a decoder's model before the given denoising steps of the batch."""

    def __init__(self, before_steps: list[int]) -> None:
        self.model = copy.deepcopy(MODELS[0])
        self.before_steps = before_steps
        self.calls = 0
        self.steps_done: dict[int, int] = {}
        """By sequence: denoising steps so far."""
        self.steps_at_update: list[dict[int, int]] = []
        """`steps_done` at each update."""

    def update_weights(self) -> int | None:
        self.calls += 1
        if self.calls - 1 not in self.before_steps:
            return None
        self.steps_at_update.append(dict(self.steps_done))
        self.model.load_state_dict(MODELS[len(self.steps_at_update)].state_dict())
        return 10 * len(self.steps_at_update)

    def observe(self, view: StepObservation) -> None:
        self.steps_done |= dict(zip(view.index, view.step, strict=True))

    def history(self, index: int) -> list[tuple[int, int]]:
        """For each update: (denoising steps of the sequence before it, number of the update, from 1)."""
        return [(steps.get(index, 0), i + 1) for i, steps in enumerate(self.steps_at_update)]


@given(
    block_size=st.integers(1, 6),
    form_and_grid=st.sampled_from(FORMS_AND_GRIDS),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    temperature=st.sampled_from([0.0, 1.0]),
    lengths=st.lists(st.tuples(st.integers(1, 11), st.integers(1, 13)), min_size=1, max_size=6),
    batch_size=st.integers(1, 4),
    before_steps=st.lists(st.integers(0, 20), min_size=1, max_size=2, unique=True),
    prefill_tokens=st.sampled_from([1, 30, 16384]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=50)
def test_goes_on_as_the_new_model_would(
    block_size, form_and_grid, strategy, temperature, lengths, batch_size, before_steps, prefill_tokens, seed
) -> None:
    """Tokens before an update come from the old model; later ones from the new model, given the tokens so far."""
    form, grid = form_and_grid
    decode_settings = DecodeSettings(block_size, grid, strategy, 0.4, 1.0, temperature=temperature)
    requests = [request(p, i, limit, seed) for i, (p, limit) in enumerate(lengths)]
    # After a prompt of mask tokens alone all positions get equal logits, and rounding would decide between them.
    assume(all(set(r.prompt_ids) != {MASK} for r in requests))
    updates = WeightUpdates(before_steps)
    decoder = BlockDecoder(updates.model, decode_settings, MASK, [EOS], batch_size, form=form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opdlm.actors.rollout.forward.PREFILL_TOKENS", prefill_tokens)
        trajectories, stats = decoder.decode(requests, 0, updates.observe, updates.update_weights)
    for ours, asked in zip(trajectories, requests, strict=True):
        history = updates.history(asked.index)
        later = [(steps, MODELS[number]) for steps, number in history]
        tokens, reveal = uncached_decode(MODELS[0], decode_settings, MASK, {EOS}, asked, later, form)
        assert ours.response_ids.tolist() == tokens
        assert ours.reveal_step.tolist() == reveal
        expected = [max([10 * number for steps, number in history if steps < step], default=0) for step in reveal]
        assert ours.weight_version == min(expected)
        if len(set(expected)) == 1:
            assert ours.token_versions is None
        else:
            assert ours.token_versions is not None
            assert (ours.token_versions.dtype, ours.token_versions.tolist()) == (np.int32, expected)
    continued = [t for t in trajectories if t.token_versions is not None]
    assert stats.weight_version == min(t.weight_version for t in trajectories)
    assert stats.continued_sequences == len(continued)
    newer = [(t.token_versions[: t.response_length] > t.weight_version).sum() for t in continued]
    assert stats.continued_tokens == sum(newer)
    assert stats.version_spread_max == max((t.token_versions.max() - t.weight_version for t in continued), default=0)


def test_without_new_weights_nothing_changes() -> None:
    requests = [request(3 + i, i) for i in range(5)]
    plain, before = BlockDecoder(MODELS[0], SETTINGS, MASK, [EOS], 2).decode(requests, 3)
    same, after = BlockDecoder(MODELS[0], SETTINGS, MASK, [EOS], 2).decode(requests, 3, update_weights=lambda: None)
    assert [t.response_ids.tolist() for t in plain] == [t.response_ids.tolist() for t in same]
    assert [(t.weight_version, t.token_versions) for t in same] == [(3, None)] * 5
    assert (before.forward_tokens, before.forwards) == (after.forward_tokens, after.forwards)
    assert (after.continued_sequences, after.continued_tokens, after.version_spread_max) == (0, 0, 0)


@pytest.fixture(scope="module")
def student(chain_teacher, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("new-weights") / "student"
    convert_checkpoint(chain_teacher, folder, 4, "absolute")
    return str(folder)


def weights(student: str, version: int) -> tuple[torch.nn.Module, WeightHandle]:
    """A model of that version, and a handle that holds its weights instead of a reference to them."""
    torch.manual_seed(version)
    model = load_model(student, "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * version * torch.randn_like(parameter)
    pack = WeightPacker().pack(version, model.named_parameters())
    return model, WeightHandle(version, [pack], pack.nbytes)


def requests_of(student: str) -> list[RolloutRequest]:
    """Requests with random prompts; each takes many denoising steps."""
    return [request(4 + i, i, limit=24, vocab=read_facts(student).vocab_size - 1) for i in range(5)]


def expected_after(student: str, step: int) -> list[tuple[list[int], list[int]]]:
    """Tokens and versions of each response if version 1 takes over after `step` denoising steps."""
    (old, _), (new, _), facts = weights(student, 0), weights(student, 1), read_facts(student)
    result = []
    for asked in requests_of(student):
        tokens, reveal = uncached_decode(old, SETTINGS, facts.mask_id, set(), asked, [(step, new)])
        result.append((tokens[:24], [int(r > step) for r in reveal][:24]))
    return result


def tokens_and_versions(trajectories: list[Trajectory]) -> list[tuple[list[int], list[int]]]:
    """The tokens of each response, and the weight version of each token."""
    return [
        (t.response.tolist(), [t.weight_version] * 24 if t.token_versions is None else t.token_versions[:24].tolist())
        for t in trajectories
    ]


def test_a_push_reaches_an_actor_that_decodes(student, monkeypatch) -> None:
    """One thread decodes; the other receives weights during a forward, which must go on with the old ones."""
    monkeypatch.setattr("opdlm.actors.rollout.actor.ray", SimpleNamespace(get=lambda pack: pack))
    actor = RolloutActor(student, "float32", 1, "continue")
    (_, old), (_, new) = weights(student, 0), weights(student, 1)
    in_forward, pushed, answers = threading.Event(), threading.Event(), []
    forwards = []

    def wait_in_the_fifth(*_) -> None:
        forwards.append(1)
        if len(forwards) == 5:
            in_forward.set()
            assert pushed.wait(timeout=PATIENCE)

    actor._model.lm_head.register_forward_pre_hook(wait_in_the_fifth)
    decoding = threading.Thread(target=lambda: answers.append(actor.decode(requests_of(student), old, SETTINGS, 5)))
    decoding.start()
    assert in_forward.wait(timeout=PATIENCE)
    before = [parameter.clone() for parameter in actor._model.parameters()]
    actor.load_weights(new)
    assert actor._version == 0
    assert all(a.equal(b) for a, b in zip(before, actor._model.parameters(), strict=True)), "a forward still runs"
    actor.load_weights(old)  # it arrives late, and an older version changes nothing
    pushed.set()
    decoding.join(timeout=PATIENCE)
    trajectories, stats = answers[0]
    assert actor._version == 1
    assert tokens_and_versions(trajectories) == expected_after(student, 5)
    assert (stats.weight_version, stats.continued_sequences, stats.version_spread_max) == (0, 5, 1)
    again, stats = actor.decode(requests_of(student), old, SETTINGS, 5)
    assert [t.weight_version for t in again] == [1] * 5, "a call that names an older version is served with this one"


def test_after_a_failed_load_the_next_call_loads_the_same_weights(student, monkeypatch) -> None:
    monkeypatch.setattr("opdlm.actors.rollout.actor.ray", SimpleNamespace(get=lambda pack: pack))
    actor = RolloutActor(student, "float32", 1, "continue")
    (_, old), (_, new) = weights(student, 0), weights(student, 1)
    actor.load_weights(old)
    good = new.pack[0].buffers["float32"][0]
    new.pack[0].buffers["float32"][0] += 1
    with pytest.raises(ValueError, match="weights version 1: checksum"):
        actor.load_weights(new)
    with pytest.raises(ValueError, match="weights version 1: checksum"):
        actor.decode(requests_of(student), old, SETTINGS, 5)
    new.pack[0].buffers["float32"][0] = good
    trajectories, _ = actor.decode(requests_of(student), old, SETTINGS, 5)
    assert {t.weight_version for t in trajectories} == {1}


@pytest.mark.ray
def test_a_push_reaches_a_ray_actor_that_decodes(ray_cluster, student) -> None:
    import ray

    ray.init(address=ray_cluster, ignore_reinit_error=True, logging_level="warning")
    actor = start_rollout_actor("continuing", student, "float32", 1, 0, 0, "continue")

    def wait_for_the_push(self) -> None:
        import time  # runs in the actor

        forwards: list[int] = []
        self.forwards = 0

        def hold(*_) -> None:
            forwards.append(1)
            self.forwards = len(forwards)
            while self.forwards == 5 and self._arrived is None:
                time.sleep(0.01)

        self._model.lm_head.register_forward_pre_hook(hold)

    try:
        old, new = (
            WeightHandle(version, [ray.put(handle.pack[0])], handle.nbytes)
            for version, (_, handle) in ((v, weights(student, v)) for v in (0, 1))
        )
        ray.get(actor.__ray_call__.remote(wait_for_the_push), timeout=PATIENCE)
        ray.get(actor.load_weights.remote(old), timeout=PATIENCE)
        decoding = actor.decode.remote(requests_of(student), old, SETTINGS, 5)
        while ray.get(actor.__ray_call__.remote(lambda self: self.forwards), timeout=PATIENCE) < 5:
            pass  # a push before the fifth forward would look the same as one at the start of the decoding call
        # This would never return if it waited for the decoding call.
        ray.get(actor.load_weights.remote(new), timeout=PATIENCE)
        trajectories, stats = ray.get(decoding, timeout=PATIENCE)
        assert tokens_and_versions(trajectories) == expected_after(student, 5)
        assert stats.continued_sequences == 5
    finally:
        ray.kill(actor)
