"""No secret gets into a run's files, an export or an error text. `pytest tests/security/test_secrets.py`"""

from __future__ import annotations

import pytest
from rich.console import Console

from opdlm.common.config import config_from_dict
from opdlm.common.errors import ConfigError
from opdlm.common.export import export
from opdlm.common.model.convert import convert_checkpoint
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.observe.report import write_report
from opdlm.deploy.observe.terminal import PlainView
from opdlm.deploy.run.directory import open_run

SECRETS = {name: f"secret-of-{name}-7d1f" for name in ("HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN")}
"""By environment variable."""


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
def test_ordinary_names_are_not_taken_for_credentials(path) -> None:
    assert config_from_dict({"model": {"teacher": "t"}, "data": {"path": path}}).data.path == path


def test_no_secret_of_the_environment_gets_into_a_run_or_an_export(model, tmp_path, monkeypatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    config = config_from_dict(
        {"model": {"teacher": str(model)}, "data": {"task": "chain", "prompts": 8}, "run": {"dir": str(run)}}
    )
    open_run(config, resume=False, checkpoint=None)
    records = RunRecords(run, PlainView(Console(file=(run / "console.log").open("w")), 1))
    records.failed([0], 1, "the actor died", "ActorDiedError")
    step = {"kind": "step", "round": 0, "step": 1, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}
    records.learned([step], {})
    records.close()
    write_report(run)
    convert_checkpoint(model, run / "student", 4, "absolute")
    export(run / "student", tmp_path / "out", "a2d-qwen3")
    files = [f for folder in (run, tmp_path / "out") for f in folder.rglob("*") if f.is_file()]
    names = {f.name for f in files}
    assert {"config.yaml", "metrics.jsonl", "report.json", "report.png", "README.md"} <= names
    assert any(name.startswith("events") for name in names)
    leaks = [(f.name, key) for f in files for key, value in SECRETS.items() if value.encode() in f.read_bytes()]
    assert leaks == []
