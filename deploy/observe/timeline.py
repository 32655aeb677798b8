"""What each actor did at which time: `RUN/timeline.json` in Chrome's trace format.

Each teacher actor, each slot of a rollout actor, the learner and the pushes have a track; a slot's spans are sequences.

Open the file at ui.perfetto.dev. Its JSON array is never closed, which the format allows: the file of a run that died
can be opened, and a resumed run appends to it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdlm.common.types import EndedSequence

log = logging.getLogger("opdlm.timeline")


class Timeline:
    """Writes each span when it ends."""

    def __init__(self, run_dir: Path) -> None:
        file = run_dir / "timeline.json"
        content = file.read_bytes() if file.exists() else b""
        complete = content.rfind(b"\n") + 1
        if complete < len(content):  # a full disk or a crash cut the last line short
            os.truncate(file, complete)
        self._file: Any = file.open("a", buffering=1)
        self._tracks: set[str] = set()
        if not complete:
            self._write("[")

    def span(self, track: str, name: str, seconds: float, ended_ago: float = 0.0, **figures: Any) -> None:
        """Writes a span.

        Args:
            track: the actor; name: what it did.
            ended_ago: seconds since the end of the span.
            figures: shown with the span.
        """
        number = zlib.crc32(track.encode()) % 10**6  # the same after a resume
        if track not in self._tracks:
            self._tracks.add(track)
            self._event({"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": track}})
        begin = (time.time() - ended_ago - seconds) * 1e6
        span = {"ph": "X", "name": name, "pid": 1, "tid": number, "ts": round(begin), "dur": round(seconds * 1e6)}
        self._event({**span, "args": figures})

    def sequences(self, actor: str, ended: Sequence[EndedSequence]) -> None:
        """Writes a span for each sequence that a rollout actor has decoded, on a track of its slot."""
        for one in ended:
            track, name, seconds = f"{actor} slot {one.lane}", f"sample {one.index}", one.began - one.ended
            self.span(track, name, seconds, one.ended, tokens=one.lengths[1], weight_version=one.weight_version)

    def learner_spans(self, event: Mapping[str, Any], ended_ago: float, work: Sequence[str]) -> None:
        """Writes the spans of an event of the learner.

        Args:
            ended_ago: seconds since the event.
            work: names of the durations that an event may have, as in `train_seconds`.
        """
        for name in work:
            if name in event:
                span = name.removesuffix("_seconds")
                self.span("learner", span, event[name], ended_ago, round=event["round"])
        if "learner_wait_seconds" in event:  # the wait for the round's samples, before its training
            self.span("learner", "wait", event["learner_wait_seconds"], ended_ago + event["train_seconds"])

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # each span was written, or its failed write logged, when it ended
                self._file.close()
            self._file = None

    def _event(self, event: dict[str, Any]) -> None:
        self._write(json.dumps(event) + ",")

    def _write(self, line: str) -> None:
        """Where the file cannot be written, the timeline ends. The run goes on, as nothing depends on it."""
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
        except OSError as error:
            log.error("%s: %s; the timeline ends here", self._file.name, error.strerror)
            self.close()


def read_spans(run_dir: Path) -> list[dict[str, Any]]:
    """The complete spans of a run, with `track`, `name`, `args`, and `ts` and `dur` in microseconds."""
    lines = (run_dir / "timeline.json").read_text().splitlines(keepends=True)[1:]
    events = [json.loads(line.rstrip(",\n")) for line in lines if line.endswith("\n")]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    return [event | {"track": tracks[event["tid"]]} for event in events if event["ph"] == "X"]
