"""Advantages. `pytest tests/common/rewards`"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlm.common.rewards import advantages

groups = st.lists(st.floats(-10, 10), min_size=2, max_size=8).filter(lambda rewards: np.std(rewards) > 1e-3)


@given(groups, st.floats(-5, 5), st.floats(0.5, 4))
def test_only_differences_count(rewards, shift, scale) -> None:
    """Advantages sum to 0; `group_std` does not see shift and scale, `group_mean` does not see the shift."""
    moved = [scale * reward + shift for reward in rewards]
    for kind, factor in (("group_std", 1.0), ("group_mean", scale)):
        found = advantages(rewards, kind)
        assert found.sum() == pytest.approx(0, abs=1e-6)
        assert advantages(moved, kind) == pytest.approx(factor * found, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("rewards", [[1.0], [0.3, 0.3, 0.3], [-1, -1]])
def test_a_group_of_equal_rewards_is_left_out(rewards) -> None:
    assert advantages(rewards, "group_std") is None
    assert advantages(rewards, "group_mean") is None


def test_the_standard_deviation_is_the_populations() -> None:
    assert advantages([0.0, 2.0], "group_std") == pytest.approx([-1, 1], rel=1e-5)
