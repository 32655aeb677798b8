"""Records in Ray's metrics, TensorBoard and wandb. `pytest tests/deploy/observe/test_writers.py`

Ray's metrics and wandb are replaced by fakes; `test_dashboard.py` has the real Ray and Prometheus.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.common.errors import OpdlmError
from opdlm.deploy.observe import writers
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.observe.report import PERIODIC
from opdlm.deploy.observe.writers import PrometheusWriter, WandbWriter
from tests.deploy.observe.all_reports import LOST, report_everything
from tests.deploy.observe.fake_metrics import FakeGauge, Values, replace_ray_metrics
from tests.deploy.observe.test_records import QUEUE, ROUND, STEP, Listener, result

RUN = "metrics-run"

# --- Prometheus -----------------------------------------------------------------------------------------------------


@pytest.fixture
def values(monkeypatch) -> Values:
    """What `PrometheusWriter` exports, by name and tags."""
    return replace_ray_metrics(monkeypatch)


def test_gauges_and_counters(tmp_path, values) -> None:
    (tmp_path / RUN).mkdir()
    records = RunRecords(tmp_path / RUN, listener := Listener())
    report_everything(records)
    records.close()
    run = (RUN,)
    assert values["ray_opdlm_step_loss"] == {run: 1.5}
    assert values["ray_opdlm_step_tokens_total"] == {run: 1600}
    assert values["ray_opdlm_round_rollout_tokens_total"] == {run: 160}, "a total of the run, not a sum of totals"
    assert values["ray_opdlm_round_refused_stale_total"] == {run: 2}, "by the queue that died, and by the next one"
    assert values["ray_opdlm_round_refused_duplicate_total"] == {run: 2}
    assert values["ray_opdlm_failure_samples_total"] == {(RUN, "RayTaskError(ValueError)"): 3}
    assert values["ray_opdlm_actor_death_deaths_total"] == {(RUN, "rollout"): 1}
    assert values["ray_opdlm_learner_restart_restarts_total"] == {run: 1}
    assert values["ray_opdlm_learner_restart_lost_steps_total"] == {run: 2}
    assert values["ray_opdlm_skipped_step_steps_total"] == {run: 1}
    assert values["ray_opdlm_failed_save_saves_total"] == {run: 2}
    assert values["ray_opdlm_evaluation_exact_match"] == {(RUN, PERIODIC): 0.5}
    assert values["ray_opdlm_steps_total"] == {run: 2}
    rounds = [r for r in listener.records if r["kind"] == "round"]
    for figure in ("rollout_idle_share", "queue_wait_seconds_mean", "weight_push_bytes", "ended_by_eos_share"):
        assert values[f"ray_opdlm_round_{figure}"] == {run: rounds[-1][figure]}


def test_a_repeated_round_lowers_no_total(values) -> None:
    writer = PrometheusWriter(RUN)
    for tokens, step in ((100, 4), (200, 8), (100, 4), (200, 8), (300, 12)):  # the learner died and was restarted
        writer.write({"kind": "round", "round": tokens // 100, "step": step, "rollout_tokens": tokens})
    assert values["ray_opdlm_round_rollout_tokens_total"] == {(RUN,): 300}
    assert (values["ray_opdlm_steps_total"], values["ray_opdlm_rounds_total"]) == ({(RUN,): 12}, {(RUN,): 3})


def test_nothing_without_ray(values, monkeypatch) -> None:
    monkeypatch.setattr(writers.ray, "is_initialized", lambda: False)
    PrometheusWriter(RUN).write({"kind": "step", "round": 0, "step": 1, "loss": 1.0})
    assert values == {}


def test_a_writer_that_fails_does_not_end_the_run(tmp_path, values, monkeypatch, caplog) -> None:
    def broken(self, value: float, tags: dict[str, str]) -> None:
        raise RuntimeError("no agent")

    monkeypatch.setattr(FakeGauge, "set", broken)
    with caplog.at_level(logging.ERROR, "opdlm.records"):
        records = RunRecords(tmp_path, listener := Listener())
        report_everything(records)
        records.close()
    assert [r.getMessage() for r in caplog.records] == ["PrometheusWriter failed and gets no more records"]
    assert sum(r["kind"] == "round" for r in listener.records) == 2
    surviving = [r for r in listener.records if r.get("loss") != LOST]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == surviving


# --- wandb and TensorBoard ------------------------------------------------------------------------------------------


class WandbRun:
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
def wandb_runs(monkeypatch) -> list[WandbRun]:
    """The runs that were started in a fake of the module `wandb`."""
    started: list[WandbRun] = []
    module = ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.Settings = SimpleNamespace
    module.init = lambda **options: started.append(WandbRun(options)) or started[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return started


def config(folder: Path) -> OpdlmConfig:
    run = {"dir": str(folder), "wandb_project": "conversions"}
    return config_from_dict({"model": {"teacher": "t"}, "data": {"path": "p"}, "run": run})


def test_wandb_has_the_names_of_tensorboard(tmp_path, wandb_runs) -> None:
    records = RunRecords(tmp_path, Listener(), more=[WandbWriter(config(tmp_path))])
    records.learned([STEP | {"round": 0, "step": 1}], QUEUE)
    records.learned([ROUND | {"round": 1, "step": 1}], QUEUE)
    records.evaluated(PERIODIC, 1, result(0.5, 2.0, 60.0))
    records.close()
    (run,) = wandb_runs
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


def test_a_resumed_run_continues_in_the_same_wandb_run(tmp_path, wandb_runs) -> None:
    WandbWriter(config(tmp_path)).close()
    WandbWriter(config(tmp_path)).close()
    assert [run.options["id"] for run in wandb_runs] == [None, "fresh-id"]
    assert [run.options["resume"] for run in wandb_runs] == ["allow", "allow"]


def test_a_missing_wandb_login_is_an_error_in_one_line(tmp_path, wandb_runs, monkeypatch) -> None:
    def refuse(**options) -> None:
        raise sys.modules["wandb"].Error("No API key configured.\nmore")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(OpdlmError, match=r"^run\.wandb_project: wandb does not start: No API key configured\. \(WANDB"):
        WandbWriter(config(tmp_path))
    assert not (tmp_path / "wandb_id").exists()
