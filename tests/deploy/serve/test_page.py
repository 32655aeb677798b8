"""The page at a server's root, in a browser. `pytest tests/deploy/serve/test_page.py`

The tests in a browser need chromium or google-chrome on PATH.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from opdlm.deploy.serve.options import ServeOptions
from opdlm.deploy.serve.page import live_page
from tests.chromium import BINARY, Chromium
from tests.deploy.serve import test_server
from tests.deploy.serve.local_server import local_server
from tests.deploy.serve.test_server import KEY, figure
from tests.patience import PATIENCE, wait_until

folders = test_server.folders
LONG = "12+3="
"""A prompt whose greedy response goes on to any limit."""
HEADERS = {"Authorization": f"Bearer {KEY}"}
needs_browser = pytest.mark.skipif(BINARY is None, reason="no chromium or google-chrome on PATH")


@pytest.fixture(scope="module")
def server(folders: list[Path], tmp_path_factory) -> Iterator[str]:
    """The address of a server that asks for a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    options = ServeOptions(checkpoint=str(folders[0]), name="tiny", slots=2, api_key_file=str(keys))
    with local_server(options) as address:
        yield address


def test_the_page_needs_no_key_and_names_no_other_place(server) -> None:
    answer = httpx.get(f"{server}/", timeout=PATIENCE)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.text == live_page()
    assert "{{" not in answer.text
    assert "//" not in answer.text.replace("// ", ""), "no address, only comments"
    described = httpx.get(f"{server}/v1/models", headers=HEADERS, timeout=PATIENCE).json()["data"][0]["opdlm"]
    assert (described["chat"], described["strategy"], described["block_size"]) == (True, "low_confidence_dynamic", 4)


@pytest.fixture
def page(server, tmp_path) -> Iterator[Chromium]:
    """The page in a browser, with the right key."""
    with Chromium(tmp_path / "profile") as browser:
        browser.open(f"{server}/")
        wait(browser, "!document.querySelector('#key-field').hidden")
        give(browser, "#key", KEY)
        browser.click("#use-key")
        wait(browser, "model")
        yield browser


def wait(browser: Chromium, condition: str, then: str = "null") -> None:
    """Waits until a JavaScript expression is true, and evaluates another one in that moment."""
    look = f"const look = () => ({condition}) ? done({then}) : setTimeout(look, 5);"
    browser.ask(f"new Promise(done => {{ {look} look(); }})")


def give(browser: Chromium, selector: str, value: object) -> None:
    """Types a value into a field."""
    value = json.dumps(str(value))
    browser.ask(
        f"{{ const f = document.querySelector({json.dumps(selector)}); f.value = {value};"
        "f.dispatchEvent(new Event('input')); f.dispatchEvent(new Event('change')); }"
    )


def text(browser: Chromium, selector: str) -> str:
    return browser.ask(f"document.querySelector({json.dumps(selector)}).textContent")


def decode(browser: Chromium, prompt: str, **fields: object) -> None:
    """Fills the form in and asks for a response."""
    give(browser, "#kind", "completion")
    for name, value in {"prompt": prompt, **fields}.items():
        give(browser, f"#{name}", value)
    browser.click("#decode")


@needs_browser
def test_the_page_shows_every_step_of_a_response(server, page) -> None:
    assert text(page, "#facts").startswith("modeltinystrategylow confidence dynamic")
    assert page.ask("document.querySelector('#kind').value") == "chat", "the model has a chat template"
    decode(page, LONG, limit=30)
    wait(page, "!running && counts.length")
    usage = page.ask("usage")
    asked = {"model": "tiny", "prompt": LONG, "max_tokens": 30}
    expected = httpx.post(f"{server}/v1/completions", json=asked, headers=HEADERS, timeout=PATIENCE).json()
    assert usage == expected["usage"]
    assert text(page, "#final") == expected["choices"][0]["text"]
    assert text(page, "#tokens") == "30"
    assert text(page, "#steps") == str(usage["denoising_steps"])
    assert float(text(page, "#per-step")) == pytest.approx(usage["tokens_per_step"], abs=0.01)
    assert int(text(page, "#per-second")) > 0
    assert text(page, "#state").startswith("ended at the limit of tokens after ")
    assert page.ask("document.querySelectorAll('#bars i').length") == usage["denoising_steps"]
    chips = page.ask("Array.from(document.querySelectorAll('#blocks .chip'), c => [c.className, c.textContent])")
    assert len(chips) == 31, "from position 5 on, to the end of a block of 4"
    assert [("after-end" in kind) for kind, _ in chips] == [False] * 30 + [True]
    assert all(kind.startswith("chip sure") for kind, _ in chips)
    colours = page.ask(
        "Array.from(document.querySelectorAll('#blocks .chip'), c => getComputedStyle(c).backgroundColor)"
    )
    assert len(set(colours)) > 5

    give(page, "#slider", 1)
    shown = page.ask("Array.from(document.querySelectorAll('#blocks .chip'), c => c.className)")
    assert shown.count("chip masked") + sum("now" in kind for kind in shown) == 3, "the first block, behind the prompt"
    assert shown.count("chip future") == 28
    assert page.problems(server, "data:", but="network") == []


@needs_browser
def test_stop_frees_the_slot_and_what_has_come_stays(server, page) -> None:
    decode(page, LONG, limit=480, threshold=1)
    wait(page, "counts.length > 5", then="document.querySelector('#stop').click()")
    wait(page, "!running")
    wait_until(lambda: figure(server, "opdlm_active_responses") == 0, "the slot")
    assert text(page, "#state").startswith("stopped after ")
    assert page.ask("document.querySelectorAll('#blocks .chip.sure').length") > 0
    assert page.ask("document.querySelector('#error').hidden")
    decode(page, "7", limit=8)
    wait(page, "!running && usage")
    assert text(page, "#tokens") == "8"
    assert page.problems(server, "data:", but="network") == []


@needs_browser
def test_errors_are_shown_and_go_away(server, page) -> None:
    decode(page, LONG, limit=9999)
    wait(page, "!document.querySelector('#error').hidden")
    assert "the model's context is 512" in text(page, "#error")
    assert text(page, "#error").endswith("(HTTP 400)")
    give(page, "#key", "wrong")
    decode(page, LONG, limit=8)
    wait(page, "document.querySelector('#error').textContent.includes('401')")
    assert "no valid key" in text(page, "#error")
    give(page, "#key", KEY)
    decode(page, LONG, limit=8)
    wait(page, "!running && usage")
    assert page.ask("document.querySelector('#error').hidden")
    assert page.ask("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert page.problems(server, "data:", but="network") == []


@needs_browser
def test_texts_are_never_markup_and_the_page_fits_a_phone(server, page) -> None:
    nasty = """<img src=x onerror="document.title='broken'"><b>"""
    page.ask(
        "for (let n = 1; n < 60; n++) take({number: n, tokens: [0, 1, 2, 3].map(i => "
        f"({{position: 4 * n + i, text: {json.dumps(nasty)}, confidence: 0.5, revealed: true}}))}})"
    )
    assert page.ask("document.querySelector('#blocks b, #blocks img')") is None
    assert text(page, "#blocks .chip") == nasty
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert page.ask("document.documentElement.scrollWidth") <= 360
    light = page.ask("getComputedStyle(document.body).backgroundColor")
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.call("Emulation.setEmulatedMedia", features=scheme)
    assert page.ask("getComputedStyle(document.body).backgroundColor") != light
    assert page.ask("document.title") == "opdlm serve"
    assert page.problems(server, "data:", but="network") == []
