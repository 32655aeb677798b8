"""How `opdlm serve` starts. `pytest tests/deploy/serve/test_command.py`"""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError

from opdlm.common.errors import OpdlmError
from opdlm.deploy.serve import command


def test_a_serve_that_gives_up_on_its_proxy_is_one_line_with_advice(monkeypatch) -> None:
    def start(**_: object) -> None:
        raise ActorDiedError

    monkeypatch.setattr(command.serve, "start", start)
    advice = r"Ray Serve did not start: .*; where the machine is busy, .* RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60"
    with pytest.raises(OpdlmError, match=advice) as raised:
        command._start_serve("127.0.0.1", 8000)
    assert "\n" not in str(raised.value)
