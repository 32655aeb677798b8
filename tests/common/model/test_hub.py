"""Names of models: folders, hub ids, neither. No test asks the network. `pytest tests/common/model/test_hub.py`"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import opdlm
from opdlm.common.errors import OpdlmError
from opdlm.common.model import hub
from opdlm.common.model.facts import read_facts
from opdlm.common.model.hub import hub_id, model_folder
from tests.tiny import save_teacher

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty cache of the hub and an empty working directory, offline."""
    hub._download.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield
    hub._download.cache_clear()


def cached(tmp_path, name: str = "me/tiny") -> Path:
    """A model as the hub's library keeps it in its cache."""
    folder = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return save_teacher(folder / "snapshots" / COMMIT)


def never(*_, **__):
    raise AssertionError("the hub was asked")


def test_a_hub_id_is_read_from_the_cache_without_network(tmp_path, capsys) -> None:
    folder = cached(tmp_path)
    assert model_folder("me/tiny") == folder
    assert model_folder(Path("me/tiny")) == folder
    assert model_folder(f"me/tiny@{COMMIT}") == folder
    assert read_facts(folder).context == 128
    assert hub_id(folder) == "me/tiny"
    assert "me/tiny is no folder here; asking the Hugging Face hub" in capsys.readouterr().err


def test_a_local_folder_wins(tmp_path, monkeypatch) -> None:
    cached(tmp_path)
    Path("me/tiny").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    assert model_folder("me/tiny") == Path("me/tiny")
    assert hub_id("me/tiny") is None


@pytest.mark.parametrize(
    "name", ["./me/tiny", "../me/tiny", "/me/tiny", "~/tiny", "tiny", "runs/demo/student", "a b/c"]
)
def test_names_that_are_local_are_never_asked_for(monkeypatch, name) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    assert model_folder(name) == Path(name).expanduser()


def test_a_name_that_is_neither_gets_both_readings() -> None:
    with pytest.raises(OpdlmError) as refused:
        model_folder("me/nothing", "model.teacher")
    assert str(refused.value) == (
        "model.teacher: me/nothing does not exist as a folder, and as a hub id it cannot be downloaded (HF_HUB_OFFLINE "
        "is set) and is not, or not whole, in the hub's cache; expected a checkpoint folder in Hugging Face layout "
        "or a hub id such as Qwen/Qwen3-0.6B (a path that begins with ./ is never asked for)"
    )


class Response:
    """As much of a reply as the errors of the hub's library read."""

    status_code, headers, request = 404, {}, None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError("404", response=Response()), "is not on the hub, or is private"),
        (errors.GatedRepoError("403", response=Response()), "needs its owner's permission"),
        (errors.RevisionNotFoundError("404", response=Response()), "has no revision 'v9'"),
        (errors.LocalEntryNotFoundError("Got: ConnectError"), "no connection to the hub"),
        (ConnectionError("[Errno 111]\nrefused"), r"cannot be downloaded: \[Errno 111\] refused"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(monkeypatch, error, words) -> None:
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(OpdlmError, match=words) as refused:
        model_folder("me/tiny@v9")
    assert "\n" not in str(refused.value)


def test_only_what_is_read_is_downloaded(tmp_path, monkeypatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how) or str(tmp_path))
    model_folder("me/tiny@v1")
    assert asked["revision"] == "v1"
    files = ["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "modeling.py", "model.gguf"]
    files += ["original/model.safetensors", "consolidated.safetensors", "chat_template.jinja", "onnx/model.onnx"]
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    kept = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert set(filter_repo_objects(files, **patterns)) == kept


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys) -> None:
    for terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        with hub._progress_class()(total=2, name="huggingface_hub.snapshot_download", desc="Fetching") as bar:
            bar.update(2)
        assert ("Fetching" in capsys.readouterr().err) == terminal


def test_a_gguf_file_is_no_model_folder(tmp_path) -> None:
    for name in ("m.gguf", "me/m.gguf"):
        with pytest.raises(
            OpdlmError, match=f"model.teacher: {name} is a GGUF file; .* `opdlm convert {name} --teacher"
        ):
            model_folder(name, "model.teacher")


def test_from_python_a_hub_id_is_a_model_too(tmp_path, capsys) -> None:
    cached(tmp_path)
    opdlm.convert("me/tiny", tmp_path / "student")
    assert read_facts(tmp_path / "student").is_student
    with pytest.raises(OpdlmError, match=r"source: x\.gguf is a GGUF file"):
        opdlm.convert("x.gguf", tmp_path / "other")
