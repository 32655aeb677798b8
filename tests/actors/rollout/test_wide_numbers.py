"""Long responses and large seeds: no number wraps around. `pytest tests/actors/rollout/test_wide_numbers.py`"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.slots import Slots
from opdlm.actors.teacher.generation import generate
from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import LoraConfig, ObjectiveConfig
from opdlm.common.data.prompts import Prompt, PromptOrder
from opdlm.common.data.tasks import get_task, problems
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.adapters import add_adapters
from opdlm.common.seeds import as_int64, sample_seed
from opdlm.common.types import HiddenTargets, RolloutRequest, ScoredTrajectory
from opdlm.deploy.run.sources import given_trajectory, rollout_request
from opdlm.learner.rollout_files import facts_of, load_samples, save_round
from opdlm.learner.rows import build_rows
from opdlm.learner.schedule import TrainingSchedule
from tests.tiny import EOS, MASK, request, tiny_model, trajectory

LENGTH = 131_072
"""Tokens of a long response; its last denoising step has the same number, where each step reveals one token."""
LARGEST = 2**64 - 1


@pytest.fixture(scope="module")
def long_one():
    """The trajectory of a long response, as the decoder's state gives it once every token is revealed."""
    slots = Slots(4, MASK, torch.zeros(0, 0), torch.zeros(0, 0), version=0)
    slots.enlarge(1, 4 + LENGTH)
    prompt = np.array([3, 4, 5, 6], np.int32)
    slots.refill([RolloutRequest(0, "long", prompt, LENGTH, seed=LARGEST)], BlockGrid(4, "absolute"), 0.9)
    slots.tokens[0, 4:] = 7
    slots.reveal[0, 4:] = torch.arange(1, LENGTH + 1)
    (made,) = slots.trajectories([0], [EOS], DecodeSettings(4))
    return made


def test_the_steps_of_a_long_response(long_one) -> None:
    assert long_one.reveal_step.dtype == np.int32
    assert np.array_equal(long_one.reveal_step, np.arange(1, LENGTH + 1))
    assert (long_one.denoising_steps, long_one.response_length) == (LENGTH, LENGTH)


def test_training_rows_of_a_long_response(long_one) -> None:
    scored = ScoredTrajectory(long_one, HiddenTargets(np.zeros((LENGTH, 1), np.float32)))
    (row,) = build_rows(scored, BlockGrid(4, "absolute"), ObjectiveConfig(), MASK, np.random.default_rng(0))
    assert len(row.input_ids) == 4 + 2 * LENGTH
    assert row.position_ids.max() == LENGTH + 3
    masked = (row.input_ids[row.clean_length :] == MASK).reshape(-1, 4)
    assert masked.any(axis=1).all(), "every block has a state of its own, in order"
    assert (np.diff(masked.astype(int), axis=1) >= 0).all(), "later tokens of a block were revealed later"


def test_saved_rollouts_of_a_long_response(long_one, tmp_path) -> None:
    config = config_from_dict({"model": {"teacher": "t"}, "data": {"path": "p"}})
    facts = facts_of(config, 32, "digest", "print")
    scored = ScoredTrajectory(long_one, HiddenTargets(np.zeros((LENGTH, 1), np.float32)))
    save_round(tmp_path / "new.safetensors", [scored], facts)
    (loaded,) = load_samples(tmp_path / "new.safetensors", [0])
    assert np.array_equal(loaded.trajectory.reveal_step, long_one.reveal_step)


def test_saved_rollouts_say_whether_they_are_drafts() -> None:
    """Steps of `verified` say where drafts began, not which states were visited: replays refuse a mixture."""
    noisy = {"teacher": "t", "logit_shift": True, "context": "causal", "lora": {"tokens": "noisy"}}
    shared = {"model": noisy, "data": {"path": "p"}}
    plain = {"rollout": {"block_grid": "response"}}
    drafts = {"rollout": {"block_grid": "response", "strategy": "verified"}, "objective": {"selection": "drafts"}}
    facts = [facts_of(config_from_dict(shared | sections), 32, "digest", "print") for sections in (plain, drafts)]
    assert facts[0] != facts[1] == replace(facts[0], drafts=True)


def test_saved_rollouts_of_earlier_versions(tmp_path) -> None:
    """They hold int16; a step that did not fit into it is told, not trained on."""
    config = config_from_dict({"model": {"teacher": "t"}, "data": {"path": "p"}})
    facts = facts_of(config, 32, "digest", "print")

    def saved(steps: list[int]) -> ScoredTrajectory:
        old = replace(trajectory([3], [4, 5, 6, 7], [1, 2, 3, 4]), reveal_step=np.array(steps, np.int16))
        save_round(tmp_path / "old.safetensors", [ScoredTrajectory(old, HiddenTargets(np.zeros((4, 1))))], facts)
        return load_samples(tmp_path / "old.safetensors", [0])[0]

    steps = saved([1, 2, 3, 32_767]).trajectory.reveal_step
    assert (steps.dtype, steps.tolist()) == (np.int32, [1, 2, 3, 32_767])
    with pytest.raises(OpdlmError, match=r"old.safetensors: sample 0 has more than 32,767 denoising steps"):
        saved([1, 2, 3, -32_768])


def test_a_long_given_response() -> None:
    response = np.full(LENGTH, 5, np.int32)
    made = given_trajectory(0, "p", np.array([3], np.int32), response, LENGTH, [EOS], BlockGrid(4, "absolute"), 0)
    assert made.reveal_step.dtype == np.int32
    assert made.response_length >= LENGTH - 4


@pytest.mark.parametrize("seed", [2**31, 2**53 + 1, 2**63, LARGEST])
def test_every_use_of_a_large_seed(seed) -> None:
    prompts = [Prompt(str(i), request(3, i).prompt_ids) for i in range(4)]
    run = {"seed": seed}
    config = config_from_dict({"model": {"teacher": "t"}, "data": {"path": "p"}, "run": run})
    requests = [rollout_request(config, PromptOrder(prompts, seed, 1), index) for index in range(4)]
    assert len({r.seed for r in requests}) == 4
    assert all(0 <= r.seed <= LARGEST for r in requests)
    requests = [replace(r, max_new_tokens=8, threshold=0.9) for r in requests]
    decoder = BlockDecoder(tiny_model(), DecodeSettings(temperature=1.0), MASK, (EOS,), 4)
    made, again = (decoder.decode(requests)[0] for _ in range(2))
    assert [t.response_ids.tolist() for t in made] == [t.response_ids.tolist() for t in again]
    assert generate(tiny_model(), [prompts[0].ids], 4, [EOS], 1, temperature=1.0, seed=sample_seed(seed, 3))
    assert len(list(itertools.islice(problems(get_task("chain"), "train", seed), 3))) == 3
    batches = TrainingSchedule(4, 4, 2, seed).batches(0, 4)
    assert sorted(place for _, places in batches for place in places) == [0, 1, 2, 3]
    pytest.importorskip("peft")
    add_adapters(tiny_model(), LoraConfig(rank=1), seed)


def test_sample_seeds_of_small_seeds_are_what_they_were() -> None:
    assert sample_seed(7, 5) == 7 * 1_000_003 + 5
    assert sample_seed(LARGEST, 0) != sample_seed(LARGEST, 1) != sample_seed(LARGEST - 1, 1)
    assert [as_int64(n) for n in (5, -1, 2**63, LARGEST)] == [5, -1, -(2**63), -1]
