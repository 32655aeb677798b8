"""Watched sequences tell every denoising step, others none. `pytest tests/actors/rollout/test_step_watch.py`"""

from __future__ import annotations

from dataclasses import replace

import pytest

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.observation import Step, StepObservation, StepWatch
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.types import RolloutRequest
from tests.actors.rollout.test_verify import FORM, drafting_model
from tests.tiny import EOS, FORMS_AND_GRIDS, MASK, request, tiny_model


def asked() -> list[RolloutRequest]:
    """Five requests, of which the second and the fourth are watched."""
    return [replace(request(3 + i, i, 6 + 3 * i, seed=i), watched=i in (1, 3)) for i in range(5)]


@pytest.mark.parametrize(("form", "grid"), FORMS_AND_GRIDS)
def test_the_steps_of_watched_sequences_are_those_that_an_observer_sees(form, grid) -> None:
    how = DecodeSettings(
        block_size=4, block_grid=grid, threshold=0.3, temperature=1.0, strategy="low_confidence_dynamic"
    )
    decoder = BlockDecoder(tiny_model(), how, MASK, [EOS], 2, form=form)
    seen = dict[int, list[Step]]()
    trajectories, _ = decoder.decode(asked(), observer=StepWatch(lambda i, step: seen.setdefault(i, []).append(step)))
    assert sorted(seen) == [1, 3]
    expected = dict[int, list[Step]]()

    def observer(observed: StepObservation) -> None:
        for row, index in enumerate(observed.index):
            masked = observed.masked[row]
            first = asked()[index].prompt_ids.size
            step = Step(
                observed.step[row],
                tuple((observed.positions[row, masked] - first).tolist()),
                tuple(observed.candidates[row, masked].tolist()),
                tuple(observed.revealed[row, masked].tolist()),
                tuple(observed.confidence[row, masked].tolist()),
            )
            expected.setdefault(index, []).append(step)

    again, _ = decoder.decode(asked(), observer=observer)
    assert [t.response.tolist() for t in again] == [t.response.tolist() for t in trajectories]
    assert seen == {index: expected[index] for index in (1, 3)}
    for index, steps in seen.items():
        assert [step.number for step in steps] == list(range(1, trajectories[index].denoising_steps + 1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lossless_decoding_tells_what_it_accepts_and_what_it_drafts(temperature) -> None:
    how = DecodeSettings(block_size=4, strategy="verified", temperature=temperature)
    decoder = BlockDecoder(drafting_model(0), how, MASK, [EOS], 2, form=FORM)
    seen = dict[int, list[Step]]()
    trajectories, _ = decoder.decode(asked(), observer=StepWatch(lambda i, step: seen.setdefault(i, []).append(step)))
    assert sorted(seen) == [1, 3]
    for index, steps in seen.items():
        whole, drafts, taken = trajectories[index], dict[int, int](), 0
        told = dict[int, tuple[int, int]]()
        for step in steps:
            assert step.confidences is None
            open_places = zip(step.positions, step.ids, step.revealed, strict=True)
            new = {position: token for position, token, now in open_places if now}
            told |= {position: (token, step.number) for position, token in new.items()}
            accepted = sorted(new)[:-1]  # behind them a token of the clean path's own
            assert all(drafts[place] == new[place] for place in accepted if place in drafts)
            taken += len(accepted)
            pairs = zip(step.positions, step.ids, step.revealed, strict=True)
            drafts = {position: token for position, token, now in pairs if not now}
        assert sorted(told) == list(range(len(told)))
        assert [told[place][0] for place in range(len(told))] == whole.response_ids[: len(told)].tolist()
        assert [told[place][1] for place in range(len(told))] == whole.reveal_step[: len(told)].tolist()
        assert len(told) >= whole.response_length
        assert taken == len(told) - len(steps)
