"""`opdlm serve` as a process of its own, which SIGTERM ends. `pytest tests/deploy/serve/test_drain.py -m slow`"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import httpx
import pytest

from tests import REPOSITORY
from tests.deploy.serve.served import endless_student
from tests.patience import PATIENCE, wait_until
from tests.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_sigterm_answers_what_is_asked_and_refuses_the_rest(tmp_path) -> None:
    student = endless_student(tmp_path, seed=0, context=4096)
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # a Ray of its own
    options = ["--port", str(port), "--drain-seconds", str(PATIENCE)]
    command = [sys.executable, "-m", "opdlm", "serve", str(student), *options]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(
            lambda: f"serving {student}" in (tmp_path / "log").read_text() or process.poll() is not None, "the server"
        )
        # Four responses of many seconds, so that the server still drains when it is asked what it says then.
        asked = {"model": student.name, "prompt": "12+3=", "max_tokens": 3000, "n": 4, "stream": True}
        asked |= {"temperature": 0, "threshold": 1.0}
        with httpx.stream("POST", f"{address}/v1/completions", json=asked, timeout=PATIENCE) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: "), (tmp_path / "log").read_text()
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: "draining" in (tmp_path / "log").read_text(), "the drain")
            assert httpx.get(f"{address}/health", timeout=PATIENCE).status_code == 503
            refused = httpx.post(f"{address}/v1/completions", json=asked | {"stream": False}, timeout=PATIENCE)
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert sum('"finish_reason": "' in line for line in rest) == 4
        assert process.wait(PATIENCE) == 0
        assert "ended; no response was cut off" in (tmp_path / "log").read_text()
    finally:
        process.kill()
