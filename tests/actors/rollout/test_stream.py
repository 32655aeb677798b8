"""A rollout actor's stream, with its real thread and without Ray. `pytest tests/actors/rollout/test_stream.py`"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from opdlm.actors.rollout.actor import RolloutActor
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.errors import OpdlmError, StreamLost
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import load_model
from opdlm.common.types import EndedSequence, RolloutRequest, Trajectory, WeightHandle
from opdlm.common.weights import WeightPacker
from tests.fakes.held_forward import held_in
from tests.oracles import uncached_decode
from tests.patience import PATIENCE, wait_until
from tests.tiny import request

SETTINGS = DecodeSettings(strategy="low_confidence_static", ignore_eos=True)


@pytest.fixture(scope="module")
def student(chain_teacher, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("stream") / "student"
    convert_checkpoint(chain_teacher, folder, 4, "absolute")
    return str(folder)


@pytest.fixture
def start(student, monkeypatch):
    """Starts an actor with weights of version 0."""
    monkeypatch.setattr("opdlm.actors.rollout.actor.ray", SimpleNamespace(get=lambda pack: pack))

    def begin(on_new_weights: str = "finish") -> RolloutActor:
        actor = RolloutActor(student, "float32", 1, on_new_weights)  # type: ignore[arg-type]
        actor.load_weights(weights(student, 0)[1])
        return actor

    return begin


def weights(student: str, version: int) -> tuple[torch.nn.Module, WeightHandle]:
    """A model of that version, and a handle that holds its weights instead of a reference to them."""
    torch.manual_seed(version)
    model = load_model(student, "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * version * torch.randn_like(parameter)
    pack = WeightPacker().pack(version, model.named_parameters())
    return model, WeightHandle(version, [pack], pack.nbytes)


def requests_of(student: str, limits: list[int], first: int = 0) -> list[RolloutRequest]:
    vocab = read_facts(student).vocab_size - 1
    return [request(4 + i, first + i, limit, vocab=vocab) for i, limit in enumerate(limits)]


def harvest_all(actor: RolloutActor, count: int) -> list[tuple[Trajectory, EndedSequence]]:
    """Everything that the actor reports until `count` sequences have ended."""
    found: list[tuple[Trajectory, EndedSequence]] = []
    while len(found) < count:
        trajectories, report = actor.harvest(eager=True)
        found += zip(trajectories, report.ended, strict=True)
    return found


def test_sequences_leave_as_they_end_and_others_take_their_slots(start, student) -> None:
    actor, limits = start(), [4, 24, 8, 4, 12, 4, 20]
    assert actor.open_stream(SETTINGS, 2, 1) == 2 + 1
    asked = requests_of(student, limits)
    actor.add(asked[:3], weights(student, 0)[1])
    first = harvest_all(actor, 1)
    actor.add(asked[3:], weights(student, 0)[1])
    found = first + harvest_all(actor, len(limits) - len(first))
    assert sorted(t.index for t, _ in found) == list(range(len(limits)))
    assert [t.index for t, _ in found].index(1) > 1, "the long sequence does not hold back short ones"
    model, mask_id = weights(student, 0)[0], read_facts(student).mask_id
    for trajectory, ended in found:
        tokens, reveal = uncached_decode(model, SETTINGS, mask_id, set(), asked[trajectory.index])
        assert (trajectory.response_ids.tolist(), trajectory.reveal_step.tolist()) == (tokens, reveal)
        assert (ended.index, ended.lengths, ended.weight_version) == (trajectory.index, trajectory.lengths, 0)
        assert ended.lane in (0, 1)
        assert 0 <= ended.ended <= ended.began
    actor.add(requests_of(student, [4], first=50), weights(student, 0)[1])
    _, report = actor.harvest(eager=False)
    assert (report.room, report.added, report.tokens_so_far) == (3, 8, 0)
    assert report.stats.occupied_slot_steps <= report.stats.slot_steps


@pytest.mark.parametrize("on_new_weights", ["finish", "continue"])
def test_weights_that_arrive_while_sequences_are_decoded(on_new_weights, start, student) -> None:
    """`finish`: what has begun ends with the old ones, and nothing else begins. `continue`: it goes on with the new."""
    actor = start(on_new_weights)
    actor.open_stream(SETTINGS, 2, 4)
    there, go = held_in(actor._model, 3)
    actor.add(requests_of(student, [8, 16, 8, 8]), weights(student, 0)[1])
    assert there.wait(timeout=PATIENCE)
    (new, handle) = weights(student, 1)
    pushing = threading.Thread(target=actor.load_weights, args=(handle,))
    pushing.start()
    while actor._arrived is None:
        pass
    go.set()
    found = {t.index: t for t, _ in harvest_all(actor, 4)}
    pushing.join(timeout=PATIENCE)
    assert [found[i].weight_version for i in range(4)] == [0, 0, 1, 1]
    assert [found[i].token_versions is None for i in range(4)] == [on_new_weights == "finish"] * 2 + [True] * 2
    mask_id = read_facts(student).mask_id
    for asked in requests_of(student, [8, 16, 8, 8])[2:]:
        assert found[asked.index].response_ids.tolist() == uncached_decode(new, SETTINGS, mask_id, set(), asked)[0]


def test_an_evaluation_runs_between_two_steps_of_the_stream(start, student) -> None:
    actor = start()
    actor.open_stream(SETTINGS, 2, 1)
    there, go = held_in(actor._model, 2)
    asked = requests_of(student, [24, 24])
    actor.add(asked, weights(student, 0)[1])
    assert there.wait(timeout=PATIENCE)
    answers: list[list[Trajectory]] = []
    exam = requests_of(student, [8, 8, 8], first=10)
    asking = threading.Thread(target=lambda: answers.append(actor.decode(exam, weights(student, 0)[1], SETTINGS, 2)[0]))
    asking.start()
    go.set()
    found = [t for t, _ in harvest_all(actor, 2)]
    asking.join(timeout=PATIENCE)
    model, mask_id = weights(student, 0)[0], read_facts(student).mask_id
    for one, wanted in zip(
        sorted(found, key=lambda t: t.index) + answers[0], requests_of(student, [24, 24]) + exam, strict=True
    ):
        assert one.response_ids.tolist() == uncached_decode(model, SETTINGS, mask_id, set(), wanted)[0]


def test_what_ends_the_decoding_is_told_with_the_next_report_and_the_stream_begins_again(start, student) -> None:
    actor = start()
    actor.open_stream(SETTINGS, 2, 1)
    with pytest.raises(ValueError, match="is empty"):
        actor.add([request(0)], weights(student, 0)[1])
    good = actor._model.lm_head.weight.data.clone()
    actor._model.lm_head.weight.data[:] = torch.nan
    actor.add(requests_of(student, [8, 8, 8]), weights(student, 0)[1])
    with pytest.raises(OpdlmError, match="NaN or infinity"):
        actor.harvest(eager=False)
    actor._model.lm_head.weight.data[:] = good
    assert actor.open_stream(SETTINGS, 2, 1) == 3
    actor.add(requests_of(student, [8]), weights(student, 0)[1])
    assert len(harvest_all(actor, 1)) == 1


def test_a_run_that_goes_back_drops_what_is_being_decoded(start, student) -> None:
    actor = start()
    actor.open_stream(SETTINGS, 2, 1)
    there, go = held_in(actor._model, 2)
    actor.add(requests_of(student, [24, 24]), weights(student, 0)[1])
    assert there.wait(timeout=PATIENCE)
    forgetting = threading.Thread(target=actor.forget_weights)
    forgetting.start()
    go.set()
    with pytest.raises(OpdlmError, match="went back to a checkpoint"):
        harvest_all(actor, 2)
    forgetting.join(timeout=PATIENCE)
    assert (actor._version, actor._stream.busy) == (-1, False)


def test_a_version_that_is_being_fetched_when_the_run_goes_back_does_not_arrive(start, student, monkeypatch) -> None:
    actor, there, go = start(), threading.Event(), threading.Event()

    def slow(_: RolloutActor, handle: WeightHandle) -> object:
        there.set()
        assert go.wait(timeout=PATIENCE)
        return handle.pack[0]

    with monkeypatch.context() as patch:
        patch.setattr(RolloutActor, "_fetch", slow)
        late = threading.Thread(target=actor.load_weights, args=(weights(student, 12)[1],))
        late.start()
        assert there.wait(timeout=PATIENCE)
        actor.forget_weights()
        go.set()
        late.join(timeout=PATIENCE)
    actor.load_weights(weights(student, 10)[1])
    assert actor._version == 10


def test_weights_that_cannot_be_loaded_are_told_to_whoever_asks_next(start, student, monkeypatch) -> None:
    actor = start()
    actor.open_stream(SETTINGS, 2, 1)
    tried = threading.Event()

    def broken(model: object, pack: object) -> None:
        tried.set()
        raise OpdlmError("the checksum differs")

    monkeypatch.setattr("opdlm.actors.rollout.student.load_weights", broken)
    actor.add(requests_of(student, [8]), weights(student, 1)[1])
    assert tried.wait(timeout=PATIENCE)
    with pytest.raises(OpdlmError, match="the checksum differs"):
        actor.harvest(eager=True)


def test_an_actor_that_was_restarted_says_that_it_has_no_stream(start, student) -> None:
    actor = start()
    with pytest.raises(StreamLost, match="restarted"):
        actor.add(requests_of(student, [4]), weights(student, 0)[1])
    with pytest.raises(StreamLost, match="restarted"):
        actor.harvest(eager=True)


def test_what_has_ended_leaves_while_an_evaluation_runs(start, student) -> None:
    actor, there, go = start(), threading.Event(), threading.Event()
    actor.open_stream(SETTINGS, 2, 1)
    decoding, go_on = held_in(actor._model, 20)
    actor.add(requests_of(student, [4, 64]), weights(student, 0)[1])
    assert decoding.wait(PATIENCE)

    def evaluate(model: object, mask_id: int) -> None:
        there.set()
        assert go.wait(timeout=PATIENCE)

    asking = threading.Thread(target=actor.use_student, args=(evaluate, None))
    asking.start()
    wait_until(lambda: actor._engine._jobs, "the evaluation")
    go_on.set()
    assert there.wait(timeout=PATIENCE)
    trajectories, _ = actor.harvest(eager=False)
    assert [t.index for t in trajectories] == [0]
    go.set()
    asking.join(timeout=PATIENCE)
