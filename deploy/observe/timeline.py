"""When each actor did what, for Perfetto: `RUN/timeline.json` in Chrome's trace format, one track an actor.

Open it at ui.perfetto.dev. The array is never closed, which the format allows, so that a run that dies leaves a file
that opens, and a resumed one goes on in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import zlib
from pathlib import Path
from typing import Any

log = logging.getLogger("opdlm.timeline")


class Timeline:
    """Writes spans as they end."""

    def __init__(self, run_dir: Path) -> None:
        file = run_dir / "timeline.json"
        before = file.read_bytes() if file.exists() else b""
        if (whole := before.rfind(b"\n") + 1) < len(before):  # a full disk, or a crash, cut the last line short
            os.truncate(file, whole)
        self._file: Any = file.open("a", buffering=1)
        self._tracks: set[str] = set()
        if not whole:
            self._write("[")

    def span(self, track: str, name: str, seconds: float, ended_ago: float = 0.0, **figures: Any) -> None:
        """A span that ended so many seconds ago. `track`: who; `name`: did what; `figures`: shown with it."""
        number = zlib.crc32(track.encode()) % 10**6  # the same in every life of a run
        if track not in self._tracks:
            self._tracks.add(track)
            self._event({"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": track}})
        begin = (time.time() - ended_ago - seconds) * 1e6
        span = {"ph": "X", "name": name, "pid": 1, "tid": number, "ts": round(begin), "dur": round(seconds * 1e6)}
        self._event({**span, "args": figures})

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # each span was written, or its failure told, when it came
                self._file.close()
            self._file = None

    def _event(self, event: dict[str, Any]) -> None:
        self._write(json.dumps(event) + ",")

    def _write(self, line: str) -> None:
        """Nothing depends on the timeline: where it cannot be written, it ends."""
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
        except OSError as error:
            log.error("%s: %s; the timeline ends here", self._file.name, error.strerror)
            self.close()


def read_spans(run_dir: Path) -> list[dict[str, Any]]:
    """All spans of a run that are written whole: `track`, `name`, `ts` and `dur` in microseconds, `args`."""
    lines = (run_dir / "timeline.json").read_text().splitlines(keepends=True)[1:]
    events = [json.loads(line.rstrip(",\n")) for line in lines if line.endswith("\n")]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    return [event | {"track": tracks[event["tid"]]} for event in events if event["ph"] == "X"]
