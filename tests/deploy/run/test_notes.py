"""What is said before a run starts, although it can start. `pytest tests/deploy/run/test_notes.py`"""

from __future__ import annotations

import pytest
import torch

from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.common.model.device import multiplies_bfloat16
from opdlm.deploy.run.notes import slow_bfloat16_notes

OLD = "AVX2"


def config_with(dtypes: tuple[str, str], rollout: float = 0, teacher: float = 0) -> OpdlmConfig:
    return config_from_dict(
        {
            "model": {"teacher": "t", "dtype": dtypes[0]},
            "data": {"task": "chain", "prompts": 9},
            "rollout": {"gpus_per_actor": rollout},
            "teacher": {"dtype": dtypes[1], "gpus_per_actor": teacher},
            "learner": {"gpus_per_worker": rollout},
        }
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (config_with(("bfloat16", "bfloat16")), "model.dtype and teacher.dtype: found `bfloat16` on CPUs"),
        (config_with(("float32", "bfloat16")), "teacher.dtype: found `bfloat16` on CPUs"),
        (config_with(("bfloat16", "bfloat16"), rollout=1), "teacher.dtype: found `bfloat16` on CPUs"),
        (config_with(("bfloat16", "bfloat16"), rollout=1, teacher=1), None),
        (config_with(("float32", "float32")), None),
    ],
)
def test_bfloat16_on_an_old_cpu_is_told(config, said) -> None:
    notes = slow_bfloat16_notes(config, OLD)
    assert [note.startswith(said) for note in notes] == [True] if said else notes == []
    assert slow_bfloat16_notes(config, "AVX512") == []


def test_this_machine_says_what_it_can() -> None:
    assert isinstance(multiplies_bfloat16(torch.backends.cpu.get_cpu_capability()), bool)
    assert multiplies_bfloat16("SVE256")
