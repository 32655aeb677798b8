"""Who may reach a run's Ray, and no secret in a run's files. `pytest tests/system/test_security_of_runs.py`"""

from __future__ import annotations

import logging

import pytest
from rich.console import Console

from opdlm.common.config import config_from_dict
from opdlm.common.config.schema import ResourcesConfig
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.export import export
from opdlm.common.model.convert import convert
from opdlm.deploy.cluster import roles as cluster
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.observe.report import write_report
from opdlm.deploy.observe.terminal import PlainView
from opdlm.deploy.run.directory import open_run
from tests.tiny import save_teacher

SECRETS = {name: f"marker-of-{name}-7d1f" for name in ("HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN")}


# --- Ray ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "token", "disabled"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "10.1.2.3", "head.example"])
def test_a_dashboard_for_others_needs_authentication(monkeypatch, mode, host) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    resources = ResourcesConfig(dashboard_host=host)
    if mode == "disabled" and host not in ("127.0.0.1", "::1", "localhost"):
        with pytest.raises(ConfigError, match=rf"resources.dashboard_host: found '{host}' with RAY_AUTH_MODE=disabled"):
            cluster.check_security(resources, "2.60.0")
    else:
        cluster.check_security(resources, "2.60.0")


@pytest.mark.parametrize("version", ["2.9.3", "2.51.1", "2.59.0"])
def test_an_old_ray_is_refused(version) -> None:
    with pytest.raises(OpdlmError, match=rf"ray: found {version}, .* at least 2.60 is needed"):
        cluster.check_security(ResourcesConfig(), version)
    for good in ("2.60.0", "2.101.0", "3.0.0.dev0"):
        cluster.check_security(ResourcesConfig(), good)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_dashboard": False}, "with resources.local_dashboard false"),
        ({"ray_address": "10.0.0.1:6379"}, "with resources.ray_address; it is for a Ray started here"),
    ],
)
def test_a_dashboard_host_that_would_have_no_effect(settings, message) -> None:
    raw = {"model": {"teacher": "t"}, "data": {"path": "p"}, "resources": {"dashboard_host": "0.0.0.0", **settings}}
    with pytest.raises(ConfigError, match=f"resources.dashboard_host: found '0.0.0.0' {message}"):
        config_from_dict(raw)


@pytest.mark.parametrize(("mode", "lines"), [("disabled", 1), ("token", 0)])
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_what_ray_is_asked_for_and_the_warning(monkeypatch, caplog, mode, lines, address) -> None:
    calls: list[dict] = []
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **asked: calls.append(asked))
    with caplog.at_level(logging.WARNING):
        cluster.join_or_start(ResourcesConfig(ray_address=address), {"CPU": [], "GPU": []})
    (asked,) = calls
    assert asked.get("dashboard_host") == (None if address else "127.0.0.1")
    assert sum("token authentication is off" in record.message for record in caplog.records) == lines


def test_a_dashboards_address_is_not_a_clusters(monkeypatch) -> None:
    """What `ray job submit` takes in RAY_ADDRESS, `opdlm train` beside it cannot join."""
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS: found http://127\.0\.0\.1:8265, a dashboard's address"):
        cluster.join_or_start(ResourcesConfig(), {"CPU": [], "GPU": []})


# --- secrets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.path", "https://me:s3cretpassword@hub.example/data.parquet"),
        ("data.path", "https://hf_s3cretABCDEFGHIJKLMNOP@hub.example/data"),
        ("data.path", "https://hub.example/d.parquet?X-Amz-Signature=s3cret&a=1"),
        ("model.teacher", "https://s3cret@hub.example/model"),
        ("model.student", "hf_s3cretABCDEFGHIJKLMNOPQRST"),
        ("run.dir", "s3://key:s3cret@bucket/run"),
    ],
)
def test_credentials_in_a_run_file_are_refused_and_not_repeated(field, value) -> None:
    raw: dict = {"model": {"teacher": "t"}, "data": {"path": "p"}, "run": {}}
    section, key = field.split(".")
    raw[section][key] = value
    with pytest.raises(ConfigError, match=rf"{field}: found credentials in .*\*\*\*.* set HF_TOKEN instead") as caught:
        config_from_dict(raw)
    assert "s3cret" not in str(caught.value)


def test_credentials_of_a_wrong_type_are_not_repeated() -> None:
    raw = {"model": {"teacher": "t"}, "data": {"path": "p", "epochs": "https://me:s3cret@hub.example"}}
    with pytest.raises(ConfigError, match=r"data.epochs: .*\*\*\*@hub.example") as caught:
        config_from_dict(raw)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("path", ["https://hub.example/data", "org/data@v1", "s3://bucket/a@b/c", "hf_data/x"])
def test_ordinary_names_are_no_credentials(path) -> None:
    assert config_from_dict({"model": {"teacher": "t"}, "data": {"path": path}}).data.path == path


def test_no_secret_of_the_environment_gets_into_a_run_or_an_export(tmp_path, monkeypatch) -> None:
    model = save_teacher(tmp_path / "model")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    config = config_from_dict(
        {"model": {"teacher": str(model)}, "data": {"task": "chain", "prompts": 8}, "run": {"dir": str(run)}}
    )
    open_run(config, resume=False, data_digest="d")
    telemetry = RunRecords(run, PlainView(Console(file=(run / "console.log").open("w")), 1))
    telemetry.failed([0], 1, "the actor died", "ActorDiedError")
    telemetry.learned(
        [{"kind": "step", "round": 0, "step": 1, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}], {}
    )
    telemetry.close()
    write_report(run)
    convert(model, run / "student", 4, "absolute")
    export(run / "student", tmp_path / "out", "a2d-qwen3")
    files = [f for folder in (run, tmp_path / "out") for f in folder.rglob("*") if f.is_file()]
    names = {f.name for f in files}
    assert {"config.yaml", "metrics.jsonl", "report.json", "report.png", "README.md"} <= names
    assert any(name.startswith("events") for name in names)
    leaks = [(f.name, key) for f in files for key, value in SECRETS.items() if value.encode() in f.read_bytes()]
    assert leaks == []
