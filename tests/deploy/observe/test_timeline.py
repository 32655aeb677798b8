"""The timeline of a run. `pytest tests/deploy/observe/test_timeline.py`"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from opdlm.deploy.observe.timeline import Timeline, read_spans
from tests.system.full_disk import no_file_above


def test_spans_have_their_times(tmp_path, monkeypatch) -> None:
    """On two tracks, and in a file that a resumed run appends to."""
    now = 1.7e9
    monkeypatch.setattr("opdlm.deploy.observe.timeline.time", SimpleNamespace(time=lambda: now))
    for start in range(2):
        timeline = Timeline(tmp_path)
        timeline.span("learner", "train", 2.0, round=start)
        timeline.span("learner", "wait", 1.0, ended_ago=2.0)
        timeline.span("rollout-0", "decode", 0.5)
        timeline.close()
    spans = read_spans(tmp_path)
    assert [s["track"] for s in spans] == ["learner", "learner", "rollout-0"] * 2
    train, wait, decode = spans[:3]
    assert train["dur"] == 2e6
    assert wait["ts"] + wait["dur"] == train["ts"]
    assert decode["ts"] + decode["dur"] == now * 1e6
    assert [s["args"] for s in spans if s["name"] == "train"] == [{"round": 0}, {"round": 1}]


@pytest.mark.parametrize("room", [0, 20])
def test_a_full_disk_ends_the_timeline_and_nothing_else(tmp_path, caplog, room) -> None:
    """Also in the middle of a line. A resumed run appends after the last complete line."""
    timeline = Timeline(tmp_path)
    timeline.span("learner", "train", 1.0)
    with no_file_above((tmp_path / "timeline.json").stat().st_size + room):
        timeline.span("learner", "train", 1.0)
        timeline.span("learner", "train", 1.0)
        timeline.close()
    assert len(read_spans(tmp_path)) == 1
    assert len([r for r in caplog.records if "the timeline ends here" in r.message]) == 1
    timeline = Timeline(tmp_path)
    timeline.span("learner", "train", 2.0)
    timeline.close()
    assert [span["dur"] for span in read_spans(tmp_path)] == [1e6, 2e6]
