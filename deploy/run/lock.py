"""The lock of a run directory: only one process at a time writes there.

    RUN/lock.json   who works in the directory: host, process, since when; its time is the last sign of life

A process that finds the lock of another one is refused. It takes the lock over where the holder has ended: on this
machine, where no process has its id and start time, or on another one, where the last sign of life is older than a
minute by the clock of the file system. A holder that finds its lock taken over (its machine slept) ends at once.

Two takers at once: the file appears whole by a hard link, which only one of them can make, and a lock that is taken
over is first renamed, and put back if it is not the one that was judged. Between the two steps, `flock` on the folder
keeps other takers out, where the file system has it (NFS does not for folders; there the two steps have to do).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from opdlm.common.errors import OpdlmError
from opdlm.deploy.run.lock_holder import FILE, Holder, age, has_ended, held_here, is_here, read

log = logging.getLogger("opdlm.lock")

_BEAT_SECONDS = 10.0
"""Time between two signs of life."""
_STALE_SECONDS = 60.0
"""Age of the last sign of life from which a holder on another machine counts as dead."""
_ATTEMPTS = 10
"""How often a lock is tried that other processes take and leave again."""


def check_unlocked(root: Path) -> None:
    """Checks that no living process works in a run directory. Changes nothing.

    Raises:
        OpdlmError: one does.
    """
    found = read(root / FILE)
    if found is not None and not has_ended(*found, root, _STALE_SECONDS):
        raise _in_use(*found, root, _STALE_SECONDS)


class RunLock:
    """Holds the lock of a run directory during a `with` block. The directory is made, and removed again if it is empty.

    Args:
        root: the run directory.
        on_lost: called, maybe in another thread, when another process has the lock. By default, this process ends.
        beat_seconds: time between two signs of life.
        stale_seconds: age of the last sign of life from which a holder on another machine counts as dead.
    """

    def __init__(
        self,
        root: Path,
        on_lost: Callable[[str], object] | None = None,
        beat_seconds: float = _BEAT_SECONDS,
        stale_seconds: float = _STALE_SECONDS,
    ) -> None:
        self._root, self._file = root, root / FILE
        self._on_lost = on_lost or _end_at_once
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._me = Holder.this_process()
        self._made: list[Path] = []
        """Folders that this lock made, outermost first."""
        self._seen = 0.0
        """When this process last found the lock to be its own, by a clock that counts a machine's sleep too."""
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._beat_regularly, name="run-lock", daemon=True)

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
            OpdlmError: a living process has it, or the directory cannot be written.
        """
        try:
            self._make_folder()
            self._take()
        except OSError as error:
            self._remove_folders()
            raise OpdlmError(f"run.dir: {self._root} cannot be written: {error.strerror}") from None
        except OpdlmError:
            self._remove_folders()
            raise
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the lock back."""
        self._released.set()
        self._beating.join()
        held_here.discard(self._me.token)
        try:
            with _no_other_taker(self._root):
                if self._is_mine():
                    self._file.unlink()
        except OSError as problem:  # the directory is gone, or its disk: the next process takes the lock over
            log.warning("%s cannot be removed: %s", self._file, problem)
        self._remove_folders()

    def verify(self) -> None:
        """Calls `on_lost` where another process has the lock. Cheap: it reads the file only after a longer silence.

        Call it before each write. A machine that slept goes on at any line, maybe before its next sign of life.
        """
        if _now() - self._seen > self._stale_seconds / 2:
            self._beat()

    def _take(self) -> None:
        for _ in range(_ATTEMPTS):
            with _no_other_taker(self._root):
                if self._create():
                    self._seen = _now()
                    held_here.add(self._me.token)
                    return
                found = read(self._file)
                if found is None:  # it was given back just now
                    continue
                if not has_ended(*found, self._root, self._stale_seconds):
                    raise _in_use(*found, self._root, self._stale_seconds)
                log.warning("run.dir: %s: %s has ended without a word; taking over", self._root, found[0])
                self._set_aside(found[0])
        raise OpdlmError(f"run.dir: {self._root}: other processes take {FILE} all the time; is it writable?")

    def _create(self) -> bool:
        """Makes the file, unless there is one. It appears with its content, in one step."""
        whole = self._root / f".{FILE}.{self._me.token}"
        try:
            whole.write_text(self._me.text, encoding="utf-8")
            with contextlib.suppress(OSError):  # NFS may report an error for a link that it has made; others have none
                os.link(whole, self._file)
            if whole.stat().st_nlink == 1 and not os.path.lexists(self._file):
                with self._file.open("x", encoding="utf-8") as stream:
                    stream.write(self._me.text)
        except FileExistsError:
            return False
        finally:
            whole.unlink(missing_ok=True)
        return self._is_mine()

    def _set_aside(self, dead: Holder) -> None:
        """Removes the lock of a dead holder, and no other one that has taken its place meanwhile."""
        aside = self._root / f".{FILE}.{self._me.token}.old"
        try:
            self._file.rename(aside)
        except FileNotFoundError:
            return
        found = read(aside)
        if found is not None and found[0].token != dead.token:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self._file)
        aside.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        found = read(self._file)
        return found is not None and found[0].token == self._me.token

    def _beat_regularly(self) -> None:
        while not self._released.wait(self._beat_seconds):
            self._beat()

    def _beat(self) -> None:
        """Gives a sign of life, if the lock is still this process's."""
        try:
            found = read(self._file)
            if found is None:  # a user removed it
                with _no_other_taker(self._root):
                    self._create()
                found = read(self._file)
            if found is not None and found[0].token == self._me.token:
                os.utime(self._file)  # the time of the file system, which all machines that see it share
                self._seen = _now()
                return
        except OSError as error:  # the disk does not answer now; no write succeeds either
            log.warning("run.dir: no sign of life in %s: %s", self._file, error)
            return
        if found is not None:
            self._on_lost(
                f"run.dir: {self._root} was taken over by {found[0]} while this process gave no sign of life for "
                f"{self._stale_seconds:g} s; it ends here and writes nothing more"
            )

    def _make_folder(self) -> None:
        missing = [path for path in (self._root, *self._root.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._made.append(path)

    def _remove_folders(self) -> None:
        for path in reversed(self._made):
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def _end_at_once(message: str) -> NoReturn:
    # Neither `finally` nor `atexit` runs: they would write records into a directory that is another process's now. Ray
    # ends this process's actors as after any death of a driver.
    print(f"opdlm: {message}", file=sys.stderr, flush=True)
    os._exit(2)


@contextlib.contextmanager
def _no_other_taker(root: Path) -> Iterator[None]:
    descriptor = os.open(root, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _in_use(holder: Holder, beat: float, root: Path, stale_seconds: float) -> OpdlmError:
    last = ""
    if not is_here(holder):
        seconds = max(age(beat, root), 0)
        last = f"; its last sign of life came {seconds:.0f} s ago, and after {stale_seconds:g} s it counts as dead"
    stop = f", stop it (kill -TERM {holder.pid} on {holder.host})" if holder.pid else ""
    return OpdlmError(f"run.dir: {root} is in use by {holder}{last}; wait until it ends{stop}, or give another run.dir")


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
