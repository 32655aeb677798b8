"""`opdlm serve` as a process of its own, which SIGTERM ends. `pytest tests/deploy/serve/test_drain.py -m slow`"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from opdlm.common.model.convert import convert_checkpoint
from tests import REPOSITORY
from tests.patience import PATIENCE, wait_until
from tests.tiny import save_teacher

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_sigterm_answers_what_is_asked_and_refuses_the_rest(tmp_path) -> None:
    student = tmp_path / "student"
    convert_checkpoint(save_teacher(tmp_path / "teacher", context=4096), student, 4, "response")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # a Ray of its own
    command = [sys.executable, "-m", "opdlm", "serve", str(student), "--port", address.rpartition(":")[2]]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(
            lambda: f"serving {student}" in (tmp_path / "log").read_text() or process.poll() is not None, "the server"
        )
        asked = {"model": "student", "prompt": "12+3=", "max_tokens": 2000, "n": 4, "stream": True, "temperature": 1}
        with httpx.stream("POST", f"{address}/v1/completions", json=asked, timeout=PATIENCE) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: "), (tmp_path / "log").read_text()
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: "draining" in (tmp_path / "log").read_text(), "the drain")
            assert httpx.get(f"{address}/health").status_code == 503
            refused = httpx.post(f"{address}/v1/completions", json=asked | {"stream": False})
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert sum('"finish_reason": "' in line for line in rest) == 4
        assert process.wait(PATIENCE) == 0
        assert "ended; no response was cut off" in (tmp_path / "log").read_text()
    finally:
        process.kill()
