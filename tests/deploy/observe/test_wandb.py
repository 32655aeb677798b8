"""wandb beside TensorBoard, with a module in wandb's place. `pytest tests/deploy/observe/test_wandb.py`"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.common.errors import OpdlmError
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.observe.report import PERIODIC
from opdlm.deploy.observe.wandb import WandbWriter
from tests.deploy.observe.test_records import QUEUE, ROUND, STEP, Listener, result


class Run:
    def __init__(self, options: dict) -> None:
        self.options, self.id = options, options["id"] or "fresh-id"
        self.logged: list[dict] = []
        self.step_metric = self.finished = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.step_metric = (name, step_metric)

    def log(self, row: dict) -> None:
        self.logged.append(row)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch) -> list[Run]:
    """Runs that were begun in a module that takes what wandb takes."""
    begun: list[Run] = []
    module = ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.Settings = SimpleNamespace
    module.init = lambda **options: begun.append(Run(options)) or begun[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return begun


def config(folder) -> OpdlmConfig:
    run = {"dir": str(folder), "wandb_project": "conversions"}
    return config_from_dict({"model": {"teacher": "t"}, "data": {"path": "p"}, "run": run})


def test_names_are_those_of_tensorboard(tmp_path, runs) -> None:
    telemetry = RunRecords(tmp_path, Listener(), more=[WandbWriter(config(tmp_path))])
    telemetry.learned([STEP | {"round": 0, "step": 1}], QUEUE)
    telemetry.learned([ROUND | {"round": 1, "step": 1}], QUEUE)
    telemetry.evaluated(PERIODIC, 1, result(0.5, 2.0, 60.0))
    telemetry.close()
    (run,) = runs
    assert run.finished
    assert run.step_metric == ("*", "optimizer_step")
    assert (run.options["project"], run.options["name"]) == ("conversions", tmp_path.name)
    assert run.options["config"]["run"]["dir"] == str(tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = {name for row in run.logged for name in row} - {"optimizer_step"}
    assert names == set(board.Tags()["scalars"])
    assert {"step/loss", "round/learner_idle_share", f"evaluation/{PERIODIC}/exact_match"} <= names
    assert run.logged[0]["step/loss"] == STEP["loss"]
    assert [row["optimizer_step"] for row in run.logged] == [1, 1, 1]


def test_a_resumed_run_goes_on_in_the_same_one(tmp_path, runs) -> None:
    WandbWriter(config(tmp_path)).close()
    WandbWriter(config(tmp_path)).close()
    assert [run.options["id"] for run in runs] == [None, "fresh-id"]
    assert [run.options["resume"] for run in runs] == ["allow", "allow"]


def test_who_is_not_logged_in_is_told(tmp_path, runs, monkeypatch) -> None:
    def refuse(**options) -> None:
        raise sys.modules["wandb"].Error("No API key configured.\nmore")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(OpdlmError, match=r"^run\.wandb_project: wandb does not start: No API key configured\. \(WANDB"):
        WandbWriter(config(tmp_path))
    assert not (tmp_path / "wandb_id").exists()
