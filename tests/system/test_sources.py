"""A run over two sources with weights: stopped, resumed, every sample of an epoch trained once, counted by source.

`pytest tests/system/test_sources.py`
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from rich.console import Console

from opdlm.common.errors import ConfigError
from opdlm.deploy.run.preflight import preflight
from opdlm.deploy.run.train import train
from tests.system.runs import PROMPTS_PER_ROUND, ROUNDS, records_of, run_config, run_until

pytestmark = pytest.mark.ray
QUIET = Console(quiet=True)


def write(file: Path, prompts: list[str]) -> str:
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(file)


def test_a_resumed_run_trains_each_sample_of_every_source_once(ray_cluster, chain_teacher, tmp_path) -> None:
    """An epoch has 2 x 6 samples of one source and 8 / 2 of the other: two rounds."""
    sums = {"path": write(tmp_path / "sums.jsonl", [f"{i}+{i}=" for i in range(6)]), "weight": 2}
    rest = {"path": write(tmp_path / "rest.jsonl", [f"9-{i}=" for i in range(8)]), "weight": 0.5}

    def config(weight: float):
        data = {"task": None, "prompts": None, "sources": [sums | {"weight": weight}, rest]}
        more = {"learner": {"workers": 1}, "evaluation": {"final_problems": 0}}
        return run_config(chain_teacher, tmp_path / "run", data=data, **more)

    assert run_until(config(2), resume=False, rounds=3, send=signal.SIGTERM) == 128 + signal.SIGTERM
    with pytest.raises(ConfigError, match=r"run\.dir: .* holds a run of another config: data\.sources"):
        train(config(3), resume=True, console=QUIET)
    assert train(config(2), resume=True, console=QUIET) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    trained = ROUNDS * PROMPTS_PER_ROUND
    assert [report[f"samples_{what}"] for what in ("trained", "lost", "trained_twice")] == [trained, 0, 0]
    counts = [(r["samples_of_sums"], r["samples_of_rest"]) for r in records_of(tmp_path / "run", "round")]
    assert len(counts) == ROUNDS
    for first, second in zip(counts[::2], counts[1::2], strict=True):
        assert (first[0] + second[0], first[1] + second[1]) == (12, 4)
    order = preflight(config(2)).order
    assert counts == [
        tuple(order.samples_by_source(range(r * PROMPTS_PER_ROUND, (r + 1) * PROMPTS_PER_ROUND)).values())
        for r in range(ROUNDS)
    ]
    held = records_of(tmp_path / "run", "data")[0]["sources"]
    assert [(s["name"], s["weight"], s["kept"], s["samples_per_epoch"]) for s in held] == [
        ("sums", 2, 6, 12),
        ("rest", 0.5, 8, 4),
    ]
