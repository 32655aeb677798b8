"""How a run examines its student."""

from __future__ import annotations

from typing import get_args

import pytest

from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import Strategy
from opdlm.deploy.evaluate.during_run import examined_with

BY_CONFIDENCE = ("low_confidence_static", "low_confidence_dynamic")
IN_ORDER = ("sequential", "sequential_dynamic")


def examined(rollouts: Strategy, order: str | None) -> tuple[Strategy, ...]:
    """How a run with these settings examines its student, without and with a threshold."""
    settings = {"model": {"teacher": "t"}, "data": {"task": "chain", "prompts": 8}, "evaluation": {"order": order}}
    settings |= {} if rollouts == "verified" else {"rollout": {"strategy": rollouts}}
    config = config_from_dict(settings)
    return tuple(examined_with(rollouts, config.decoding_order, dynamic) for dynamic in (False, True))


@pytest.mark.parametrize("rollouts", get_args(Strategy))
def test_a_student_is_examined_in_the_order_of_its_rollouts(rollouts: Strategy) -> None:
    expected = {
        "verified": ("verified", "verified"),
        "sequential": IN_ORDER,
        "sequential_dynamic": IN_ORDER,
    }.get(rollouts, BY_CONFIDENCE)
    assert examined(rollouts, None) == expected


@pytest.mark.parametrize("rollouts", [*BY_CONFIDENCE, *IN_ORDER, "random", "entropy_bounded"])
def test_evaluation_order_comes_before_it(rollouts: Strategy) -> None:
    for order, expected in (("confidence", BY_CONFIDENCE), ("sequential", IN_ORDER)):
        assert examined(rollouts, order) == expected
