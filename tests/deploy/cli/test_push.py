"""`opdlm push` against a hub that only takes notes. `pytest tests/deploy/cli/test_push.py`"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from opdlm.common.export import export
from opdlm.common.model.convert import convert_checkpoint
from tests.deploy.cli.test_cli import opdlm
from tests.tiny import save_teacher


class NotingHub:
    """Has the calls of `huggingface_hub.HfApi` that push uses."""

    def __init__(self) -> None:
        self.created: list[dict] = []
        self.sent: dict[str, bytes] = {}
        self.exists = False

    def repo_exists(self, repository):
        return self.exists

    def create_repo(self, repository, *, private, exist_ok):
        self.created.append({"repository": repository, "private": private, "exist_ok": exist_ok})

    def create_commit(self, repository, *, operations, commit_message):
        for operation in operations:
            with operation.as_file() as stream:
                self.sent[operation.path_in_repo] = stream.read()
        return SimpleNamespace(repo_url=f"https://hub.test/{repository}")


@pytest.fixture
def hub(monkeypatch) -> NotingHub:
    noting = NotingHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: noting)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    return noting


@pytest.fixture
def student(tmp_path):
    convert_checkpoint(save_teacher(tmp_path / "teacher"), tmp_path / "student", 4, "absolute")
    return tmp_path / "student"


def test_a_student_is_sent_with_a_card(hub, student) -> None:
    (student / "notes.txt").write_text("mine")
    (student / ".env").write_text("HF_TOKEN=hf_secret")
    (student / "events").mkdir()
    printed = opdlm("push", student, "me/tiny", "--private", "--base-model", "me/base")
    assert "https://hub.test/me/tiny: 12 files" in printed
    assert "not sent: .env, events, notes.txt" in printed
    assert hub.created == [{"repository": "me/tiny", "private": True, "exist_ok": True}]
    names = {path.name for path in student.iterdir()} - {"notes.txt", ".env", "events"}
    assert hub.sent.keys() == names | {"README.md"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_a2d.py", "block_causal.py"} <= names
    assert all(hub.sent[name] == (student / name).read_bytes() for name in names)
    card = hub.sent["README.md"].decode()
    assert "base_model: me/base" in card
    assert "AutoModelForMaskedLM" in card
    assert not (student / "README.md").exists(), "the folder itself stays as it was"


def test_an_export_keeps_its_card(hub, student, tmp_path) -> None:
    export(student, tmp_path / "sdar", "sdar", base_model="me/base")
    opdlm("push", tmp_path / "sdar", "me/tiny")
    assert hub.created[0]["private"] is None, "the hub decides"
    assert hub.sent["README.md"] == (tmp_path / "sdar" / "README.md").read_bytes()
    error = opdlm("push", tmp_path / "sdar", "me/tiny", "--base-model", "me/other", code=2)
    assert "has a card already: change it in README.md" in error


def test_dry_run_lists_and_asks_nothing(student, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: pytest.fail("the token was read"))
    printed = opdlm("push", student, "me/tiny", "--dry-run")
    assert "model.safetensors" in printed
    assert "README.md" in printed
    assert "12 files" in printed
    assert "would be sent to me/tiny" in printed


def test_a_repository_that_exists_stays_as_visible_as_it_is(hub, student) -> None:
    hub.exists = True
    assert "me/tiny exists; whether it is public is left as it is" in opdlm("push", student, "me/tiny", "--public")
    assert hub.sent


def test_what_is_no_finished_student_is_never_sent(hub, student, tmp_path) -> None:
    assert "is an autoregressive model; this command sends students" in opdlm(
        "push", tmp_path / "teacher", "me/tiny", code=2
    )
    for name, message in [
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "has no tokenizer"),
        ("config.json", "has no config.json"),
    ]:
        broken = tmp_path / f"without-{name}"
        shutil.copytree(student, broken)
        (broken / name).unlink()
        if name == "tokenizer.json":
            (broken / "tokenizer_config.json").unlink()
        assert message in opdlm("push", broken, "me/tiny", code=2)
    raw = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(raw | {"intermediate_size": 33}))
    assert "but config.json makes it [33, 16]" in opdlm("push", student, "me/tiny", code=2)
    assert "expected a repository on the hub, as ORG/NAME" in opdlm("push", student, "tiny", code=2)
    assert hub.created == []
    assert hub.sent == {}


def test_without_token_or_network_there_is_one_line(hub, student, monkeypatch) -> None:
    def fail(error):
        def raise_it(*_, **__):
            raise error

        return raise_it

    refused = errors.HfHubHTTPError(
        "403 Forbidden:\nno rights", response=SimpleNamespace(status_code=403, headers={}, request=None)
    )
    for error, message in [
        (errors.OfflineModeIsEnabled("offline"), "push: HF_HUB_OFFLINE is set, so me/tiny cannot be reached"),
        (OSError("Name or service\nnot known"), "me/tiny cannot be reached: Name or service not known; nothing is"),
        (refused, "the hub refused me/tiny (403): 403 Forbidden: no rights; is the token allowed to write there?"),
    ]:
        monkeypatch.setattr(hub, "repo_exists", fail(error))
        assert message in opdlm("push", student, "me/tiny", code=2)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "no token for the hub; log in with `hf auth login`, or set HF_TOKEN" in opdlm(
        "push", student, "me/tiny", code=2
    )
    assert hub.sent == {}
