"""Ray metrics of a run's records, and the Grafana dashboard over them. `pytest tests/deploy/observe/test_prometheus.py`"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from dataclasses import asdict

import pytest
import yaml

import opdlm.deploy.observe.prometheus
from opdlm.actors.queue.actor import ReplayQueueActor
from opdlm.actors.teacher.actor import ScoreStats
from opdlm.common.types import DecodeStats, WeightHandle
from opdlm.deploy.observe.prometheus import PrometheusWriter
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.observe.report import PERIODIC
from opdlm.learner.train_step import StepResult
from tests import REPOSITORY
from tests.deploy.observe.test_records import ROUND, Listener, result

DASHBOARD = REPOSITORY / "deploy" / "grafana" / "opdlm.json"
ACTORS = {"rollout_actors": 2, "teacher_actors": 1}
RUN = "metrics-run"
LOST = 9.0
"""Loss of a step that is trained again, so that `metrics.jsonl` no longer has it."""


def expressions() -> list[str]:
    """Every panel's queries."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def names() -> set[str]:
    """Every metric that the panels and the variables ask for."""
    return set(re.findall(r"ray_opdlm_\w+", DASHBOARD.read_text()))


async def _queue_state() -> dict:
    """Of a real queue that took four samples, one of them twice, refused one as stale, handed one on, lost one."""
    queue = ReplayQueueActor(4, 1, 12, 0)
    await queue.weights_taken(0)
    assert await queue.lease(8) == list(range(8))
    assert await queue.put([0, 1, 2, 3], 0, list("abcd")) == [True] * 4
    assert await queue.put([0], 0, ["a"]) == [False]
    assert await queue.put([4], -1, ["e"]) == [False]
    await queue.take_round(0)
    waiting = asyncio.ensure_future(queue.replace(2, "c"))
    assert await queue.lease(8) == [2]
    assert await queue.put([2], 0, ["c"]) == [True]
    assert await waiting == "c"
    return await queue.state()


def tell(telemetry: RunRecords) -> None:
    """What a run says: every kind of record, with something in every counter."""
    state = asyncio.run(_queue_state()) | ACTORS
    telemetry.data(12, ["row 3: too long"], "digest")
    telemetry.given(4, 100, cached=False, cut=1)
    start = {"kind": "learner_start", "round": 0, "step": 0}
    lost = {"kind": "step", "round": 0, "step": 2, "loss": LOST}
    telemetry.learned([start, lost, start], state)  # of its starts only those after the first are worth a record
    place = {"round": 0, "step": 0, "in_a_row": 1, "reason": "why"}
    skipped, unsaved = (
        {"kind": "skipped_step", "steps": 1},
        {"kind": "failed_save", "saves": 1, "checkpoint_seconds": 0.2},
    )
    telemetry.learned([skipped | place, unsaved | place, unsaved | place | {"in_a_row": 2}], state)
    telemetry.actor_died("rollout-1", "killed")
    telemetry.queue_died("killed")
    telemetry.failed([0, 1, 2], 1, "ValueError: no such thing", "RayTaskError(ValueError)")
    step = {"kind": "step", "learning_rate": 1e-3, **asdict(StepResult(1.5, 2.0, 7, 1, 30, 800, 50, 0.2))}
    for round_ in (1, 2):
        telemetry.pushed(WeightHandle(round_ - 1, [], 64), 0.5)
        telemetry.decoded(DecodeStats(0, 4, 80, 40, 12, 300, 2.0, ended_by_eos=3))
        telemetry.scored(ScoreStats(80, 90, 0.5, 160))
        place = {"round": round_ - 1, "step": round_}
        telemetry.learned([step | place | {"forward_kl_nats": 1.5}], state)
        counted = {"staleness_max": 1, "learner_wait_seconds": 0.1, "rollout_tokens": 80 * round_}
        telemetry.learned([ROUND | {"round": round_, "step": round_} | counted], state)
        place = {"round": round_, "step": round_}
        publish = {"kind": "publish", "weight_version": round_, "publish_seconds": 0.1, "nbytes": 64}
        telemetry.learned([publish | place, {"kind": "checkpoint", "checkpoint_seconds": 0.3} | place], state)
        telemetry.evaluated(PERIODIC, round_, result(0.5, 2.0, 60.0))


class Recorded:
    """Ray's Gauge and Counter as this module uses them, by the name that Prometheus gets."""

    values: dict[str, dict[tuple, float]]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.series = self.values.setdefault(self.exported(name), {})
        self.tag_keys = tag_keys

    def _key(self, tags: dict[str, str]) -> tuple:
        assert set(tags) == set(self.tag_keys)
        return tuple(tags[key] for key in self.tag_keys)


class FakeGauge(Recorded):
    @staticmethod
    def exported(name: str) -> str:
        return f"ray_{name}"

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.series[self._key(tags)] = value


class FakeCounter(Recorded):
    @staticmethod
    def exported(name: str) -> str:
        return f"ray_{name}_total"

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray refuses it"
        self.series[self._key(tags)] = self.series.get(self._key(tags), 0) + value


@pytest.fixture
def values(monkeypatch) -> dict[str, dict[tuple, float]]:
    """Metrics without Ray: values by name and tags."""
    monkeypatch.setattr(Recorded, "values", {}, raising=False)
    monkeypatch.setattr(opdlm.deploy.observe.prometheus, "Gauge", FakeGauge)
    monkeypatch.setattr(opdlm.deploy.observe.prometheus, "Counter", FakeCounter)
    monkeypatch.setattr(opdlm.deploy.observe.prometheus.ray, "is_initialized", lambda: True)
    return Recorded.values


def test_levels_and_totals(tmp_path, values) -> None:
    (tmp_path / RUN).mkdir()
    telemetry = RunRecords(tmp_path / RUN, listener := Listener())
    tell(telemetry)
    telemetry.close()
    assert names() - values.keys() == set(), "the dashboard asks for metrics that no record makes"
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
    sink = PrometheusWriter(RUN)
    for tokens, step in ((100, 4), (200, 8), (100, 4), (200, 8), (300, 12)):  # the learner died and came back
        sink.write({"kind": "round", "round": tokens // 100, "step": step, "rollout_tokens": tokens})
    assert values["ray_opdlm_round_rollout_tokens_total"] == {(RUN,): 300}
    assert (values["ray_opdlm_steps_total"], values["ray_opdlm_rounds_total"]) == ({(RUN,): 12}, {(RUN,): 3})


def test_nothing_without_ray(values, monkeypatch) -> None:
    monkeypatch.setattr(opdlm.deploy.observe.prometheus.ray, "is_initialized", lambda: False)
    PrometheusWriter(RUN).write({"kind": "step", "round": 0, "step": 1, "loss": 1.0})
    assert values == {}


def test_a_sink_that_fails_ends_no_run(tmp_path, values, monkeypatch, caplog) -> None:
    def broken(self, value: float, tags: dict[str, str]) -> None:
        raise RuntimeError("no agent")

    monkeypatch.setattr(FakeGauge, "set", broken)
    with caplog.at_level(logging.ERROR, "opdlm.telemetry"):
        telemetry = RunRecords(tmp_path, listener := Listener())
        tell(telemetry)
        telemetry.close()
    assert [r.getMessage() for r in caplog.records] == ["PrometheusWriter failed and gets no more records"]
    assert sum(r["kind"] == "round" for r in listener.records) == 2
    surviving = [r for r in listener.records if r.get("loss") != LOST]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == surviving


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [p for p in dashboard["panels"] if p["type"] != "row"]
    assert all(p["targets"] and p["description"] for p in panels)
    assert len({p["id"] for p in dashboard["panels"]}) == len(dashboard["panels"])
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert all(0 <= x < 24 for x, _ in cells)


# --- with real Ray and real Prometheus ------------------------------------------------------------------------------


def _wait_for(ask, what: str):
    """`ask()` once it is true; exports come every 10 s."""
    end = time.monotonic() + 120
    while not (answer := ask()):
        assert time.monotonic() < end, f"waited 120 s for {what}"
        time.sleep(0.5)
    return answer


@pytest.fixture(scope="module")
def endpoint(ray_cluster, tmp_path_factory) -> str:
    """`host:port` of the Ray agent that serves this process's metrics, after a stream of records."""
    import ray

    ray.init(address=ray_cluster, ignore_reinit_error=True, logging_level="warning")
    here = ray.get_runtime_context().get_node_id()
    node = next(n for n in ray.nodes() if n["NodeID"] == here)
    folder = tmp_path_factory.mktemp("run") / RUN
    folder.mkdir()
    telemetry = RunRecords(folder, Listener())
    tell(telemetry)
    telemetry.close()
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def _scrape(endpoint: str) -> dict[str, list[str]]:
    """Lines of this test's run by metric name."""
    try:
        text = urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=10).read().decode()
    except OSError:  # the agent is starting
        return {}
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("ray_opdlm") and f'run="{RUN}"' in line:
            found.setdefault(line.split("{")[0], []).append(line)
    return found


@pytest.mark.ray
def test_ray_serves_every_metric_of_the_dashboard(endpoint) -> None:
    _wait_for(lambda: names() <= _scrape(endpoint).keys(), f"{sorted(names() - _scrape(endpoint).keys())}")
    served = _scrape(endpoint)
    (loss,), (tokens,), (failed,) = (
        served[f"ray_opdlm_{name}"] for name in ("step_loss", "step_tokens_total", "failure_samples_total")
    )
    assert [float(line.split()[-1]) for line in (loss, tokens, failed)] == [1.5, 1600, 3]
    assert 'reason="RayTaskError(ValueError)"' in failed


@pytest.mark.ray
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the binary `prometheus` (Debian: prometheus)")
def test_prometheus_answers_every_panel(endpoint, tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [endpoint]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            ["prometheus", *options, f"--web.listen-address={address}", "--log.level=warn"], stderr=log
        )

    def answers(query: str) -> bool:
        query = query.replace("$run", RUN).replace("$__rate_interval", "1m")
        url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            return bool(json.load(urllib.request.urlopen(url, timeout=10))["data"]["result"])
        except OSError:  # it is starting
            return False

    try:
        for query in expressions():
            _wait_for(lambda query=query: answers(query), f"an answer to {query}")
        assert not answers("ray_opdlm_no_such_metric")
    finally:
        server.terminate()
        server.wait(timeout=30)
