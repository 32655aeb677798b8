"""How the learner's worker group is started. `pytest tests/learner/test_group.py`"""

from __future__ import annotations

import pytest

from opdlm.common.config import config_from_dict
from opdlm.learner.group import rank_environment

GROWS = {"env_vars": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}}


@pytest.mark.parametrize(
    ("gpus", "transport", "given", "expected"),
    [
        (1, "object_store", {}, GROWS),
        (0, "object_store", {}, {}),
        (1, "nixl", {}, {}),
        (1, "object_store", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {}),
        (1, "object_store", {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, {}),
    ],
)
def test_gpu_memory_grows_without_gaps_unless_the_user_says_otherwise(gpus, transport, given, expected) -> None:
    config = config_from_dict(
        {
            "model": {"teacher": "t"},
            "data": {"task": "chain", "prompts": 9},
            "rollout": {"weight_transport": transport, "gpus_per_actor": gpus},
            "learner": {"gpus_per_worker": gpus},
        }
    )
    assert rank_environment(config, given) == expected
