"""What web pages of other servers ask of a server, through a browser. `pytest tests/deploy/serve/test_origin.py`"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from opdlm.deploy.serve.options import ServeOptions
from tests.chromium import Chromium
from tests.deploy.serve import test_server
from tests.deploy.serve.local_server import local_server
from tests.deploy.serve.test_page import decode, needs_browser, text, wait
from tests.deploy.serve.test_server import KEY
from tests.patience import PATIENCE

folders = test_server.folders


@pytest.fixture(scope="module")
def server(folders: list[Path]) -> Iterator[str]:
    """A server without keys."""
    with local_server(ServeOptions(checkpoint=str(folders[0]), name="tiny", slots=2)) as address:
        yield address


def version(server: str) -> int:
    return int(httpx.get(f"{server}/v1/models/tiny", timeout=PATIENCE).json()["weight_version"])


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
        answer = httpx.post(f"{server}{path}", content="{}", headers=headers, timeout=PATIENCE)
        assert answer.status_code == 403, (origin, answer.text)
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("permission_error", "other_origin")
        assert f"found {origin} at" in error["message"]
    assert version(server) == before


def test_the_servers_own_page_and_programs_are_answered(server) -> None:
    port, before = server.rpartition(":")[2], version(server)
    asked = {"model": "tiny", "prompt": "1+2=", "max_tokens": 4}
    for headers in ({}, {"Origin": server}, {"Origin": f"http://LOCALHOST:{port}", "Host": f"localhost:{port}"}):
        assert httpx.post(f"{server}/v1/completions", json=asked, headers=headers, timeout=PATIENCE).status_code == 200
        assert httpx.post(f"{server}/admin/reload", headers=headers, timeout=PATIENCE).status_code == 200
    assert version(server) == before + 3


def test_a_key_says_enough(folders, tmp_path) -> None:
    (tmp_path / "keys").write_text(KEY)
    options = ServeOptions(checkpoint=str(folders[0]), name="tiny", slots=2, api_key_file=str(tmp_path / "keys"))
    foreign = {"Origin": "https://example.com"}
    with local_server(options) as address:
        with_key = foreign | {"Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{address}/v1/models", headers=with_key, timeout=PATIENCE).status_code == 200
        assert httpx.get(f"{address}/v1/models", headers=foreign, timeout=PATIENCE).status_code == 401


@needs_browser
def test_in_a_browser_its_page_is_answered_and_that_of_another_server_is_not(server, tmp_path) -> None:
    (tmp_path / "site").mkdir()
    site = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path / "site"))
    threading.Thread(target=site.serve_forever, daemon=True).start()
    before = version(server)
    try:
        with Chromium(tmp_path / "profile") as browser:
            browser.open(f"http://127.0.0.1:{site.server_port}/")
            for policy in ("no-referrer", "unsafe-url"):
                how = f"{{method: 'POST', mode: 'no-cors', body: '{{}}', referrerPolicy: '{policy}'}}"
                sent = browser.ask(f"fetch('{server}/admin/reload', {how}).then(answer => answer.type)")
                assert sent == "opaque", "it was sent, and the page cannot read the answer"
            assert version(server) == before
            browser.open(f"{server}/")
            wait(browser, "model")
            decode(browser, "12+3=", limit=10)
            wait(browser, "!running && counts.length")
            assert text(browser, "#tokens") == "10"
            assert browser.ask("fetch('/admin/reload', {method: 'POST'}).then(answer => answer.status)") == 200
    finally:
        site.shutdown()
        site.server_close()
    assert version(server) == before + 1
