"""The frozen reference of a policy gradient. `pytest tests/deploy/run/test_reference.py`"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opdlm.common.form import PAPER_FORM
from opdlm.common.grid import BlockGrid
from opdlm.common.model.load import load_model
from opdlm.common.types import PolicyTargets
from opdlm.deploy.run.reference import add_reference
from opdlm.learner.policy_gradient import Draws
from tests import golden_files


@pytest.mark.parametrize("path", golden_files.cases("rl"), ids=lambda p: p.stem)
def test_reference_logprobs_are_those_of_the_states_that_revealed_the_tokens(path) -> None:
    """With the trained model as the reference they are its new log-probabilities, by brute force."""
    case = golden_files.load(path)
    model = load_model(golden_files.ROOT / "models" / case["model"])
    found = golden_files.group_trajectories(case)
    samples = [replace(scored, targets=PolicyTargets(1.0)) for scored, _ in found]
    samples.append(replace(samples[0], targets=PolicyTargets(None)))
    grid, draws = BlockGrid(case["block_size"], case["block_grid"]), Draws(case["temperature"], (case["mask_id"],))
    made, _ = add_reference(model, case["mask_id"], samples, grid, PAPER_FORM, draws)
    assert made.pop().targets.reference_logprobs is None, "a group that is left out needs none"
    for one, (_, sample) in zip(made, found, strict=True):
        ours, theirs = (
            torch.from_numpy(one.targets.reference_logprobs),
            torch.tensor(sample["expected"]["new_logprobs"]),
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
