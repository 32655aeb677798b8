"""The Grafana dashboard over the metrics of a run, also with real Ray and Prometheus.

`pytest tests/deploy/observe/test_dashboard.py`; the test of the panels needs the binary `prometheus` on PATH.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request

import pytest
import yaml

from opdlm.deploy.observe.records import RunRecords
from tests import REPOSITORY
from tests.deploy.observe.all_reports import report_everything
from tests.deploy.observe.fake_metrics import replace_ray_metrics
from tests.deploy.observe.test_records import Listener
from tests.patience import PATIENCE, wait_until
from tests.ports import free_ports

DASHBOARD = REPOSITORY / "deploy" / "grafana" / "opdlm.json"
RUN = "metrics-run"


def queries() -> list[str]:
    """The queries of all panels."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def metric_names() -> set[str]:
    """Every metric in the queries of panels and variables."""
    return set(re.findall(r"ray_opdlm_\w+", DASHBOARD.read_text()))


def test_every_metric_of_the_dashboard_is_written(tmp_path, monkeypatch) -> None:
    values = replace_ray_metrics(monkeypatch)
    records = RunRecords(tmp_path, Listener())
    report_everything(records)
    records.close()
    assert metric_names() - values.keys() == set(), "the dashboard asks for metrics that no record has"


def test_panels_are_complete_and_do_not_overlap() -> None:
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


@pytest.fixture(scope="module")
def endpoint(ray_cluster, tmp_path_factory) -> str:
    """`host:port` of the Ray agent that serves this process's metrics, after all reports of a run."""
    import ray

    ray.init(address=ray_cluster, ignore_reinit_error=True, logging_level="warning")
    here = ray.get_runtime_context().get_node_id()
    node = next(n for n in ray.nodes() if n["NodeID"] == here)
    folder = tmp_path_factory.mktemp("run") / RUN
    folder.mkdir()
    records = RunRecords(folder, Listener())
    report_everything(records)
    records.close()
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def _scrape(endpoint: str) -> dict[str, list[str]]:
    """The lines about this test's run, by metric name."""
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
    def complete() -> dict[str, list[str]]:
        served = _scrape(endpoint)
        return served if metric_names() <= served.keys() else {}

    served = wait_until(complete, f"{sorted(metric_names())}")
    (loss,), (tokens,), (failed,) = (
        served[f"ray_opdlm_{name}"] for name in ("step_loss", "step_tokens_total", "failure_samples_total")
    )
    assert [float(line.split()[-1]) for line in (loss, tokens, failed)] == [1.5, 1600, 3]
    assert 'reason="RayTaskError(ValueError)"' in failed


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the binary `prometheus` (Debian: prometheus)")
def test_prometheus_answers_every_panel(endpoint, tmp_path) -> None:
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
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
        except OSError:  # Prometheus is starting
            return False

    try:
        for query in queries():
            wait_until(lambda query=query: answers(query), f"an answer to {query}")
        assert not answers("ray_opdlm_no_such_metric")
    finally:
        server.terminate()
        server.wait(timeout=PATIENCE)
