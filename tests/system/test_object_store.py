"""A whole run with more samples than Ray's object store holds. `pytest tests/system/test_object_store.py`"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from opdlm.common.config import OpdlmConfig
from opdlm.deploy.observe.records import read_records
from tests.conftest import cluster_of
from tests.system.runs import losses, run_config, train_here
from tests.tiny import save_teacher

pytestmark = [pytest.mark.ray, pytest.mark.slow]

VOCABULARY, STORE_MEGABYTES = 32768, 80


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory) -> Path:
    """A teacher whose vocabulary is so large that the logits of one token take 128 KiB."""
    others = "".join(chr(0x3400 + i) for i in range(VOCABULARY - 18))
    return save_teacher(tmp_path_factory.mktemp("wide") / "teacher", alphabet="0123456789+-=;" + others)


def wide_config(teacher: Path, run_dir: Path) -> OpdlmConfig:
    """A run whose samples hold logits, more than a megabyte each, and that has one checkpoint, its last."""
    return run_config(
        teacher,
        run_dir,
        run={"rounds": 4},
        data={"prompts": 200},
        rollout={"prompts_per_round": 32, "batch_size": 16},
        learner={"workers": 1, "batch_size": 16},
        teacher={"targets": "logits"},
        evaluation={"final_problems": 0},
        checkpoint={"every_rounds": 10},
    )


@pytest.fixture
def small_store() -> Iterator[None]:
    """Another cluster, with a small object store; this process leaves the one that it is connected to."""
    ray.shutdown()
    with cluster_of({"num_cpus": 8, "object_store_memory": STORE_MEGABYTES << 20}):
        yield


@pytest.fixture
def roomy(ray_cluster, wide_teacher, tmp_path) -> Path:
    """Directory of the same run in a cluster whose store has room for its samples."""
    train_here(wide_config(wide_teacher, tmp_path / "roomy"))
    return tmp_path / "roomy"


def test_more_samples_than_the_store_holds(roomy, small_store, wide_teacher, tmp_path) -> None:
    """The queue keeps all four rounds, because the first checkpoint comes at the end. Ray spills them to disk."""
    train_here(wide_config(wide_teacher, tmp_path / "tight"))
    rounds = [r for r in read_records(tmp_path / "tight") if r["kind"] == "round"]
    kept = sum(r["target_bytes_per_token"] * r["round_tokens"] for r in rounds)
    assert kept > 1.5 * (STORE_MEGABYTES << 20)
    assert (rounds[-1]["refused_duplicate"], rounds[-1]["refused_stale"]) == (0, 0)
    steps = [r for r in read_records(tmp_path / "tight") if r["kind"] == "step"]
    assert sum(r["rows"] + r["rows_without_loss"] for r in steps) == 4 * 32
    assert losses(tmp_path / "tight") == losses(roomy)
