"""What web pages of other servers ask of a server, through a browser. `pytest tests/deploy/serve/test_origin.py`"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from opdlm.deploy.serve.options import ServeOptions
from tests.deploy.serve import test_server
from tests.deploy.serve.local_server import local_server
from tests.deploy.serve.test_server import KEY

folders = test_server.folders


@pytest.fixture(scope="module")
def server(folders: list[Path]) -> Iterator[str]:
    """A server without keys."""
    with local_server(ServeOptions(checkpoint=str(folders[0]), name="tiny", slots=2)) as address:
        yield address


def version(server: str) -> int:
    return int(httpx.get(f"{server}/v1/models/tiny").json()["weight_version"])


@pytest.mark.parametrize("path", ["/admin/reload", "/v1/completions", "/v1/chat/completions"])
def test_a_page_of_another_server_is_refused_whatever_it_asks(server, path) -> None:
    port, before = server.rpartition(":")[2], version(server)
    foreign = [
        ("https://example.com", None),
        ("null", None),
        ("http://127.0.0.1:1", None),
        (f"http://[::1]:{port}", None),
    ]
    foreign += [(f"http://example.com:{port}", f"example.com:{port}")]  # its name has come to mean this machine
    for origin, host in foreign:
        headers = {"Origin": origin, "Content-Type": "text/plain"} | ({"Host": host} if host else {})
        answer = httpx.post(f"{server}{path}", content="{}", headers=headers)
        assert answer.status_code == 403, (origin, answer.text)
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("permission_error", "other_origin")
        assert f"found {origin} at" in error["message"]
    assert version(server) == before


def test_the_servers_own_page_and_programs_are_answered(server) -> None:
    port, before = server.rpartition(":")[2], version(server)
    asked = {"model": "tiny", "prompt": "1+2=", "max_tokens": 4}
    for headers in ({}, {"Origin": server}, {"Origin": f"http://LOCALHOST:{port}", "Host": f"localhost:{port}"}):
        assert httpx.post(f"{server}/v1/completions", json=asked, headers=headers).status_code == 200
        assert httpx.post(f"{server}/admin/reload", headers=headers).status_code == 200
    assert version(server) == before + 3


def test_a_key_says_enough(folders, tmp_path) -> None:
    (tmp_path / "keys").write_text(KEY)
    options = ServeOptions(checkpoint=str(folders[0]), name="tiny", slots=2, api_key_file=str(tmp_path / "keys"))
    foreign = {"Origin": "https://example.com"}
    with local_server(options) as address:
        with_key = foreign | {"Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{address}/v1/models", headers=with_key).status_code == 200
        assert httpx.get(f"{address}/v1/models", headers=foreign).status_code == 401
