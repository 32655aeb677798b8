"""Who holds the lock of a run directory (`lock.py`), and whether that process still lives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import uuid
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

FILE = "lock.json"
held_here: set[str] = set()
"""Tokens of the locks that this process holds. Its other locks are left from an end that was interrupted."""
_HIDDEN = -1
"""In place of its start: a living process that this user may not see (`hidepid` of /proc)."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that has the lock."""

    token: str
    """Random; no two locks have the same."""
    host: str
    machine: str
    """Id of the kernel's start, and the PID namespace: process ids can be compared only where both are equal."""
    pid: int
    started: int | None
    """When the process started, in clock ticks after the kernel: another process of this id started at another time."""
    since: str
    """When it took the lock, in its own local time."""

    @staticmethod
    def this_process() -> Holder:
        """This process as a new holder."""
        pid, now = os.getpid(), datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return Holder(uuid.uuid4().hex, socket.gethostname(), _machine(), pid, _start_of(pid), now)

    @property
    def text(self) -> str:
        """Content of the lock file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


def read(file: Path) -> tuple[Holder, float] | None:
    """The holder in a lock file, and its last sign of life by the file system's clock; None where there is no file.

    A file that is no lock, or was cut short, has an unknown holder on another machine.
    """
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:  # NFS asks its server anew when a file is opened
            text, beat = stream.read(), os.fstat(stream.fileno()).st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Holder(**json.loads(text)), beat
    except (ValueError, TypeError):
        return Holder("", "an unknown host", "", 0, None, "an unknown time"), beat


def has_ended(holder: Holder, beat: float, root: Path, stale_seconds: float) -> bool:
    """Whether a holder that `read` found in a run directory is dead, or counts as dead."""
    if holder.pid == os.getpid() and is_here(holder):
        return holder.token not in held_here
    if is_here(holder) and holder.started is not None:
        return _start_of(holder.pid) not in (holder.started, _HIDDEN)
    return age(beat, root) > stale_seconds


def age(beat: float, root: Path) -> float:
    """Seconds since a time stamp in the folder. The clock that made it is asked: clocks of machines differ."""
    with tempfile.NamedTemporaryFile(prefix=f".{FILE}.", dir=root) as probe:
        os.utime(probe.name)
        return os.stat(probe.name).st_mtime - beat


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks after its kernel. None: it has ended, as a zombie has."""
    with contextlib.suppress(OSError, IndexError):
        # pid (name) state ... ; the name may hold spaces and brackets. Field 22 is the start (man 5 proc_pid_stat).
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        return _HIDDEN
    return _HIDDEN


def is_here(holder: Holder) -> bool:
    """Whether the holder's process id means the same in this process."""
    return bool(holder.machine) and holder.machine == _machine()


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
