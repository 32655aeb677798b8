"""The advantages of a group: how much better each of a prompt's responses is than the others (METHOD.md section 7)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opdlm.common.config.method import Advantage

_SMALLEST_SPREAD = 1e-6


def advantages(rewards: Sequence[float], kind: Advantage) -> np.ndarray | None:
    """The advantage of each response of a group, `[G]` float64.

    Args:
        rewards: of the G responses to one prompt.
        kind: `group_std`: divided by the population standard deviation. `group_mean`: not divided.

    Returns: None where all rewards are equal: such a group teaches nothing and is left out.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.max() == values.min():
        return None
    centred = values - values.mean()
    return centred / (values.std() + _SMALLEST_SPREAD) if kind == "group_std" else centred
