"""Signals: the first one asks for an end and says so, the second one ends at once.

`pytest tests/deploy/run/test_stop.py`
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from rich.console import Console

from opdlm.common.config import config_from_dict
from opdlm.deploy.observe.session import show_end
from opdlm.deploy.observe.terminal import open_view
from opdlm.deploy.run.stop import EndAtOnce, Stopped, StopRequest
from tests import REPOSITORY
from tests.patience import PATIENCE

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    """The handlers of this process are after a test what they were before it, and its logging works."""
    given = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` it is ignored
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in (before | {signal.SIGHUP: given}).items():
        signal.signal(number, handler)
    assert after[signal.SIGTERM] == before[signal.SIGTERM]
    assert logging.root.manager.disable == logging.NOTSET


async def send(number: int) -> None:
    os.kill(os.getpid(), number)
    for _ in range(10):  # turns of the event loop: it reads the signal, calls its handler, begins what that asked for
        await asyncio.sleep(0)


def told(terminal: bool, *numbers: int, apart: float = 2.0) -> tuple[str, list[str], int]:
    """What the user reads after these signals, in a live view or plain; what was stopped; the exit code.

    `apart`: seconds between two signals, by a clock of the test's own.
    """
    now = 0.0
    file, stopped = io.StringIO(), []
    console = Console(file=file, force_terminal=terminal, width=200)

    async def run(end: EndAtOnce) -> int:
        stop = StopRequest(console, end)

        async def ask() -> None:
            stopped.append("asked")

        stop.calls(ask, lambda: "round 7 of 75 is finished if its training has begun, then a checkpoint is written")
        nonlocal now
        for number in numbers:
            await send(number)
            now += apart
        return stop.exit_code

    clock = SimpleNamespace(monotonic=lambda: now)
    with patch("opdlm.deploy.run.stop.time", clock), EndAtOnce() as end, open_view(console, 75, 0):
        code = asyncio.run(run(end))
    return file.getvalue(), stopped, code


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_told_at_once_and_asks_for_an_end(number, terminal) -> None:
    text, stopped, code = told(terminal, number)
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert (
        f"{name}: round 7 of 75 is finished if its training has begun, then a checkpoint is written; a second" in text
    )
    assert (stopped, code) == (["asked"], 128 + number)


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT,) * 2, (signal.SIGTERM, signal.SIGINT), (1, 15)])
def test_the_second_one_ends_at_once_with_its_own_code(first, second) -> None:
    with pytest.raises(Stopped, match="ended at once; --resume goes on from the last checkpoint") as raised:
        told(False, first, second)
    assert raised.value.code == 128 + second


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    """`timeout` sends it to the process and to its group."""
    text, stopped, code = told(False, signal.SIGTERM, signal.SIGTERM, apart=0.5)
    assert (text.count("SIGTERM"), stopped, code) == (1, ["asked"], 143)


def test_a_hang_up_that_was_ignored_at_the_start_stays_ignored() -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        text, stopped, code = told(False, signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (text, stopped, code) == ("", [], 0)


def test_a_signal_between_preparing_and_the_loops_is_not_lost() -> None:
    asked = []

    async def run(end: EndAtOnce) -> None:
        stop = StopRequest(Console(file=io.StringIO()), end)
        await stop.cancels(asyncio.sleep(0))
        await send(signal.SIGTERM)

        async def ask() -> None:
            asked.append(True)

        stop.calls(ask, lambda: "")
        await asyncio.sleep(0)

    with EndAtOnce() as end:
        asyncio.run(run(end))
    assert asked == [True]


def test_a_terminal_that_is_gone_does_not_end_the_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    async def run(end: EndAtOnce) -> int:
        console = Console(file=Gone())
        stop = StopRequest(console, end)
        await send(signal.SIGHUP)
        console.print("a later line")
        return stop.exit_code

    with EndAtOnce() as end:
        assert asyncio.run(run(end)) == 128 + signal.SIGHUP


def test_rays_handler_and_asyncios_are_replaced() -> None:
    with pytest.raises(Stopped, match=r"SIGTERM: the run had not begun"), EndAtOnce():
        raise SystemExit(signal.SIGTERM)  # as Ray's handler does while Ray starts

    def taken_back() -> None:
        with EndAtOnce() as end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            end.take()
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(10)

    with pytest.raises(Stopped) as raised:
        taken_back()
    assert raised.value.code == 128 + signal.SIGTERM


def test_a_stop_before_the_first_round_is_one_line(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "publish", "round": 0, "step": 0}\n')
    file = io.StringIO()
    sections = {"model": {"teacher": "t"}, "data": {"path": "p"}, "run": {"dir": str(tmp_path)}}
    show_end(config_from_dict(sections), (8, 8), stopped=True, console=Console(file=file, width=200))
    assert file.getvalue() == "stopped before the first round; --resume starts it\n"


_WAITS = """
import sys, time
import opdlm.deploy.run.train as driver

def connect(config):
    print("connecting", flush=True)
    time.sleep(600)

driver.connect = connect
sys.argv = ["opdlm", "train", sys.argv[1]]
from opdlm.deploy.cli import app
app()
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_while_ray_starts_is_one_line(chain_teacher, tmp_path, number) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run: {{dir: {tmp_path / 'run'}, rounds: 1}}\nmodel: {{teacher: {chain_teacher}, dtype: float32}}\n"
        "data: {task: chain, prompts: 8}\nrollout: {prompts_per_round: 8, max_new_tokens: 8}\n"
        "teacher: {dtype: float32}\nevaluation: {final_problems: 0}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITS, str(file)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "connecting\n")
    assert any("starting Ray" in line or "joining the Ray cluster" in line for line in lines)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert errors == f"opdlm: {name}: the run had not begun, so nothing is lost\n"
    assert process.returncode == 128 + number
