"""Processes that end although something in them waits for ever. `pytest tests/deploy/cluster/test_process_end.py`"""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from tests import REPOSITORY
from tests.patience import PATIENCE, wait_until


def started(script: str) -> subprocess.Popen[str]:
    """A process whose output nobody reads yet; what it prints stays in its buffer until it is flushed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


_WAITS = """
import subprocess, time
from opdlm.deploy.cluster.process_end import ends_process_after
child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
with ends_process_after(0.2, 'RAY_ADDRESS: too slow'):
    time.sleep(600)
"""


def test_a_wait_that_nothing_interrupts_ends_the_process_and_its_children_with_one_line() -> None:
    process = started(_WAITS)
    out, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (2, "opdlm: RAY_ADDRESS: too slow\n")
    wait_until(lambda: not runs(int(out)), "the end of the child")


_ENDS_WITHIN = """
import os, time
from opdlm.deploy.cluster import process_end
process_end._WRITE_SECONDS = 0.2
{stderr}
process_end.end_within(0.1, 3, "too slow")
time.sleep(600)
"""
_FULL_PIPE = """
os.set_blocking({number}, False)
try:
    while True:
        os.write({number}, b"x" * 4096)
except BlockingIOError:
    os.set_blocking({number}, True)
"""
_CLOSED_PIPE = "reader, writer = os.pipe(); os.dup2(writer, 2); os.close(reader)"


@pytest.mark.parametrize("stderr", [_FULL_PIPE.format(number=2), _CLOSED_PIPE])
def test_nobody_has_to_read_the_line(stderr) -> None:
    process = started(_ENDS_WITHIN.format(stderr=stderr))
    assert process.wait(PATIENCE) == 3
    process.communicate()


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


_PRINTS = """
import os
from opdlm.deploy.cluster import process_end
process_end._FLUSH_SECONDS = {seconds}
{stdout}
print("last words")
process_end.end_now(3)
"""


@pytest.mark.parametrize("full", [False, True])
def test_what_is_printed_is_still_written_unless_nobody_makes_room(full) -> None:
    pipe = {"seconds": 0.1, "stdout": _FULL_PIPE.format(number=1)} if full else {"seconds": PATIENCE, "stdout": ""}
    process = started(_PRINTS.format(**pipe))
    assert process.wait(PATIENCE) == 3
    out, _ = process.communicate()
    assert ("last words" in out) is not full
