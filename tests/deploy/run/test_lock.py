"""Two processes and one run directory. `pytest tests/deploy/run/test_lock.py`

Holders are real processes that take the lock, say so, and hold it until their standard input ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opdlm.common.errors import OpdlmError
from opdlm.deploy.run.lock import RunLock, check_unlocked
from opdlm.deploy.run.lock_holder import FILE, Holder

HOLD = """
import sys
from pathlib import Path
from opdlm.common.errors import OpdlmError
from opdlm.deploy.run.lock import RunLock
try:
    with RunLock(Path(sys.argv[1]), beat_seconds=float(sys.argv[2])):
        print("taken", flush=True)
        sys.stdin.read()
    print("given back", flush=True)
except OpdlmError as error:
    print(error, flush=True)
"""

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that takes the lock of a folder."""
    started: list[subprocess.Popen] = []

    def holder(root: Path, beat_seconds: float = 10.0) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(root), str(beat_seconds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, **pipes))
        return started[-1]

    yield holder
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def says(process: subprocess.Popen) -> str:
    return process.stdout.readline().strip()


def replace_lock(root: Path, beat: float | None = None, **changed) -> Holder:
    """Writes the lock of a holder like this process but for `changed`, with its last sign of life at `beat`."""
    holder = dataclasses.replace(Holder.this_process(), **changed)
    (root / "other").write_text(holder.text)
    (root / "other").rename(root / FILE)
    if beat is not None:
        os.utime(root / FILE, (beat, beat))
    return holder


def now_of(root: Path) -> float:
    """The time by the clock of the folder's file system."""
    (root / "clock").touch()
    return (root / "clock").stat().st_mtime


def test_a_second_process_is_refused_and_the_first_loses_nothing(tmp_path, start) -> None:
    root = tmp_path / "runs" / "a"
    first = start(root)
    assert says(first) == "taken"
    before = (root / FILE).read_text()
    with pytest.raises(OpdlmError, match="in use by process") as caught, RunLock(root):
        pass
    with pytest.raises(OpdlmError, match="in use by process"):
        check_unlocked(root)
    message, holder = str(caught.value), json.loads(before)
    assert f"run.dir: {root} is in use by process {first.pid} on {holder['host']} (since {holder['since']})" in message
    assert f"kill -TERM {first.pid}" in message
    assert "\n" not in message
    second = start(root)
    assert says(second).startswith(f"run.dir: {root} is in use by process {first.pid}")
    assert (root / FILE).read_text() == before
    assert [path.name for path in root.iterdir()] == [FILE]
    first.stdin.close()
    assert says(first) == "given back"
    assert not (tmp_path / "runs").exists(), "the folders that the lock made are empty"
    check_unlocked(root)


def test_the_lock_of_a_killed_process_is_taken_over_by_one_of_several(tmp_path, start) -> None:
    first = start(tmp_path)
    assert says(first) == "taken"
    first.send_signal(signal.SIGKILL)
    first.wait()
    check_unlocked(tmp_path)
    assert (tmp_path / FILE).exists(), "a check changes nothing"
    takers = [start(tmp_path) for _ in range(3)]
    answers = [says(taker) for taker in takers]
    assert sorted(answer == "taken" for answer in answers) == [False, False, True], answers
    winner = takers[answers.index("taken")]
    assert json.loads((tmp_path / FILE).read_text())["pid"] == winner.pid
    assert all(f"in use by process {winner.pid} on" in answer for answer in answers if answer != "taken")
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_process_that_was_killed_and_not_waited_for_has_ended(tmp_path, start) -> None:
    first = start(tmp_path)
    assert says(first) == "taken"
    first.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    with RunLock(tmp_path):
        pass


def test_another_process_of_the_same_id_is_not_the_holder(tmp_path) -> None:
    parent = os.getppid()
    replace_lock(tmp_path, pid=parent, started=1)
    with RunLock(tmp_path):
        pass
    replace_lock(tmp_path, pid=os.getpid())  # left behind by an end of this process that was interrupted
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("machine", ["another kernel", ""])
def test_a_holder_on_another_machine_counts_as_dead_after_a_minute_without_a_sign(tmp_path, machine) -> None:
    """Its process id means nothing here, and its clock is not ours: the file system's clock decides."""
    elsewhere = {"host": "elsewhere", "machine": machine, "pid": 2**30}
    replace_lock(tmp_path, now_of(tmp_path) - 40, **elsewhere)
    with pytest.raises(OpdlmError, match=r"process 1073741824 on elsewhere .*; its last sign of life came \d\d s ago"):
        check_unlocked(tmp_path)
    with pytest.raises(OpdlmError, match="after 60 s it counts as dead; wait until it ends"), RunLock(tmp_path):
        pass
    replace_lock(tmp_path, now_of(tmp_path) - 70, **elsewhere)
    check_unlocked(tmp_path)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"host": 1', "\x00"])
def test_a_file_that_is_no_lock_counts_as_one_of_another_machine(tmp_path, content) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(OpdlmError, match="in use by process 0 on an unknown host") as caught:
        check_unlocked(tmp_path)
    assert "kill" not in str(caught.value)
    os.utime(tmp_path / FILE, (1.0, 1.0))
    with RunLock(tmp_path):
        pass


def test_a_holder_whose_lock_was_taken_over_ends_itself(tmp_path, start) -> None:
    """Its own `finally` does not run: it would write into a directory that is another process's."""
    first = start(tmp_path, beat_seconds=0.05)
    assert says(first) == "taken"
    other = replace_lock(tmp_path, host="elsewhere", machine="another kernel")
    assert first.wait() == 2
    assert first.stdout.read() == ""
    assert f"opdlm: run.dir: {tmp_path} was taken over by process {other.pid} on elsewhere" in first.stderr.read()
    assert json.loads((tmp_path / FILE).read_text())["token"] == other.token


def test_a_write_after_a_long_sleep_looks_at_the_lock_first(tmp_path, monkeypatch) -> None:
    """A machine that slept goes on at any line, maybe before the next sign of life is due."""
    clock, lost = [1000.0], []
    monkeypatch.setattr("opdlm.deploy.run.lock._now", lambda: clock[0])
    with RunLock(tmp_path, on_lost=lost.append, beat_seconds=3600) as lock:
        replace_lock(tmp_path, host="elsewhere", machine="another kernel")
        clock[0] += 10
        lock.verify()
        assert lost == []
        clock[0] += 60
        lock.verify()
        assert len(lost) == 1
        assert "was taken over by" in lost[0]
    assert (tmp_path / FILE).exists(), "the lock of the other process stays"


def test_signs_of_life_are_given_and_a_removed_lock_comes_back(tmp_path) -> None:
    with RunLock(tmp_path, beat_seconds=3600) as lock:
        os.utime(tmp_path / FILE, (1.0, 1.0))
        lock._beat()
        assert (tmp_path / FILE).stat().st_mtime > 1.0
        (tmp_path / FILE).unlink()
        lock._beat()
        with pytest.raises(OpdlmError, match="is in use by"):
            check_unlocked(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["flock", "link"])
def test_file_systems_without_locks_of_folders_or_without_hard_links(tmp_path, monkeypatch, missing) -> None:
    def refuse(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(f"opdlm.deploy.run.lock.{'fcntl.flock' if missing == 'flock' else 'os.link'}", refuse)
    replace_lock(tmp_path, pid=os.getppid(), started=1)
    with RunLock(tmp_path):
        refused: list[OpdlmError] = []

        def take() -> None:
            try:
                RunLock(tmp_path).__enter__()
            except OpdlmError as error:
                refused.append(error)

        other = threading.Thread(target=take)
        other.start()
        other.join()
        assert len(refused) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_taker_that_comes_late_puts_back_the_lock_of_the_one_before_it(tmp_path) -> None:
    """Two processes found the same dead holder; without `flock`, the second may rename the first one's new lock."""
    dead = replace_lock(tmp_path, pid=os.getppid(), started=1)
    late = RunLock(tmp_path)
    with RunLock(tmp_path):
        mine = (tmp_path / FILE).read_text()
        late._set_aside(dead)
        assert (tmp_path / FILE).read_text() == mine
    assert list(tmp_path.iterdir()) == []
