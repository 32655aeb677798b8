"""Run files that name models by hub id. `pytest tests/deploy/run/test_local_models.py`"""

from __future__ import annotations

import huggingface_hub
import pytest
import yaml

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.model import hub
from opdlm.deploy.run.paths import absolute_paths, local_models
from opdlm.deploy.run.preflight import preflight
from tests.tiny import save_teacher


@pytest.fixture
def snapshots(tmp_path, monkeypatch):
    """A hub whose newest commit of `me/tiny` is set by the test; yields (folder of a commit, what was asked)."""
    hub._download.cache_clear()
    asked = []
    newest = {"commit": "aaaa"}

    def folder(commit):
        path = tmp_path / "cache" / "models--me--tiny" / "snapshots" / commit
        return path if path.exists() else save_teacher(path)

    def download(name, **_):
        asked.append(name)
        return str(folder(newest["commit"]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    yield folder, asked, newest
    hub._download.cache_clear()


def config(tmp_path, **model) -> OpdlmConfig:
    return OpdlmConfig.model_validate(
        {
            "run": {"dir": str(tmp_path / "run")},
            "model": model,
            "data": {"task": "chain", "prompts": 8},
            "rollout": {"max_new_tokens": 20},
        }
    )


def test_a_hub_id_becomes_the_folder_that_actors_get(tmp_path, snapshots) -> None:
    folder, asked, _ = snapshots
    found = absolute_paths(local_models(config(tmp_path, teacher="me/tiny", student="me/tiny")))
    assert found.model.teacher == found.model.student == str(folder("aaaa"))
    assert asked == ["me/tiny"], "one question for both"
    assert preflight(absolute_paths(local_models(config(tmp_path, teacher="me/tiny")))).teacher.context == 128


def test_a_run_that_has_begun_keeps_its_files(tmp_path, snapshots) -> None:
    folder, asked, newest = snapshots
    begun = absolute_paths(local_models(config(tmp_path, teacher="me/tiny")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(begun.model_dump(mode="json")))
    newest["commit"] = "bbbb"
    hub._download.cache_clear()
    assert local_models(config(tmp_path, teacher="me/tiny")).model.teacher == str(folder("aaaa"))
    assert asked == ["me/tiny"]
    elsewhere = config(tmp_path / "other", teacher="me/tiny")
    assert local_models(elsewhere).model.teacher == str(folder("bbbb"))


def test_a_gguf_file_and_an_unknown_name_are_told_by_setting(tmp_path, monkeypatch) -> None:
    hub._download.cache_clear()
    with pytest.raises(OpdlmError, match=r"model\.student: x\.gguf is a GGUF file"):
        local_models(config(tmp_path, teacher=str(save_teacher(tmp_path / "t")), student="x.gguf"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpdlmError, match=r"model\.teacher: me/nothing does not exist as a folder, and as a hub id"):
        local_models(config(tmp_path, teacher="me/nothing"))


def test_in_a_job_a_relative_folder_is_named_beside_what_the_hub_says(tmp_path, monkeypatch) -> None:
    """`models/chain-teacher` of a demo that was sent as a job looks like a hub id, which no hub has."""
    hub._download.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(OpdlmError) as refused:
        local_models(config(tmp_path, teacher="models/chain-teacher"))
    job, hub_line = str(refused.value).split("\n")
    assert job.startswith("model.teacher: models/chain-teacher is in this job's copy of the working directory")
    assert job.endswith("give an absolute path that every node sees, e.g. model.teacher=/shared/models/chain-teacher")
    assert hub_line.startswith("model.teacher: models/chain-teacher does not exist as a folder, and as a hub id it ")
    hub._download.cache_clear()
