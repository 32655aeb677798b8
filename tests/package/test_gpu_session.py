"""The session of tests and measurements for a GPU, with other parts. `pytest tests/package/test_gpu_session.py`"""

from __future__ import annotations

import json
import sys

import pytest

from tests.gpu import session
from tests.gpu.session import PARTS, Part


def test_parts_fail_alone_and_end_in_time(monkeypatch, tmp_path, capsys) -> None:
    parts = (
        Part("fails", "tests", 60, ("json.tool", str(tmp_path / "nothing"))),
        Part("hangs", "tests", 3, ("http.server", "0", "--bind", "127.0.0.1")),
        Part("works", "tests", 60, ("json.tool", "--help")),
        Part("of another kind", "bench", 60, ("json.tool", "--help")),
    )
    monkeypatch.setattr(session, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["session", "--only", "tests", "--out", str(tmp_path), "--minutes", "5"])
    assert session.main() == 1
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [(part["name"], part["how"]) for part in found["parts"]] == [
        ("fails", "failed (2)"),
        ("hangs", "cut off"),
        ("works", "ok"),
    ]
    assert "===== hangs: cut off" in (tmp_path / "log.txt").read_text()
    assert "works" in capsys.readouterr().out.splitlines()[-2]


def test_parts_for_which_no_time_is_left_are_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(session, "PARTS", (Part("late", "tests", 60, ("json.tool", "--help")),))
    monkeypatch.setattr(sys, "argv", ["session", "--out", str(tmp_path), "--minutes", "0.1"])
    assert session.main() == 1


@pytest.mark.parametrize("kind", ["tests", "bench"])
def test_each_kind_fits_into_ten_minutes_but_for_its_last_part(kind) -> None:
    limits = [part.seconds for part in PARTS if part.kind == kind]
    assert sum(limits[:-1]) < 600, "even if every part before it takes all of its time, the last one begins"
