"""A whole run with more samples than Ray's object store holds. `pytest tests/system/test_object_store.py`"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from opdlm.common.config import OpdlmConfig, dump_config
from opdlm.deploy.observe.records import read_records
from opdlm.deploy.run.train import train
from tests.conftest import cluster_of
from tests.system.runs import losses, run_config, run_to_end
from tests.tiny import save_teacher

pytestmark = [pytest.mark.ray, pytest.mark.slow]

VOCABULARY, STORE_MEGABYTES = 32768, 80


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory) -> Path:
    """A teacher whose vocabulary is so large that the logits of one token take 128 KiB."""
    others = "".join(chr(0x3400 + i) for i in range(VOCABULARY - 18))
    return save_teacher(tmp_path_factory.mktemp("wide") / "teacher", alphabet="0123456789+-=;" + others)


def wide_config(teacher: Path, run_dir: Path, **sections) -> OpdlmConfig:
    """A run whose samples hold logits, more than a megabyte each."""
    base = {
        "run": {"rounds": 4},
        "data": {"prompts": 200},
        "rollout": {"prompts_per_round": 32, "batch_size": 16},
        "learner": {"workers": 1, "batch_size": 16},
        "teacher": {"targets": "logits"},
        "evaluation": {"final_problems": 0},
    }
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}
    return run_config(teacher, run_dir, **merged)


@contextmanager
def small_store() -> Iterator[dict[str, str]]:
    """Starts a cluster with a small object store; yields the environment variables of a driver that joins it."""
    with cluster_of({"num_cpus": 8, "object_store_memory": STORE_MEGABYTES << 20}) as cluster:
        yield os.environ | {"RAY_ADDRESS": cluster.address}


def run_with(config: OpdlmConfig, environment: dict[str, str]) -> str:
    """Runs `opdlm train` in a process of its own to its end; returns its output."""
    file = Path(config.run.dir).with_suffix(".yaml")
    file.write_text(dump_config(config))
    done = run_to_end(file, environment=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_more_samples_than_the_store_holds(ray_cluster, wide_teacher, tmp_path) -> None:
    """The queue keeps all four rounds, because the first checkpoint comes at the end. Ray spills them to disk."""
    checkpoint = {"every_rounds": 10}
    roomy, tight = (wide_config(wide_teacher, tmp_path / name, checkpoint=checkpoint) for name in ("roomy", "tight"))
    assert train(roomy, resume=False, console=Console(quiet=True)) == 0
    with small_store() as environment:
        run_with(tight, environment)
    rounds = [r for r in read_records(tmp_path / "tight") if r["kind"] == "round"]
    kept = sum(r["target_bytes_per_token"] * r["round_tokens"] for r in rounds)
    assert kept > 1.5 * (STORE_MEGABYTES << 20)
    assert (rounds[-1]["refused_duplicate"], rounds[-1]["refused_stale"]) == (0, 0)
    steps = [r for r in read_records(tmp_path / "tight") if r["kind"] == "step"]
    assert sum(r["rows"] + r["rows_without_loss"] for r in steps) == 4 * 32
    assert losses(tmp_path / "tight") == losses(tmp_path / "roomy")
