"""The page of `opdlm trace`: its embedded data, and its behaviour in a browser.

`pytest tests/deploy/tools/trace/test_page.py`; the tests in a browser need chromium or google-chrome on PATH.
"""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

from opdlm.deploy.tools.trace.command import run_trace
from opdlm.deploy.tools.trace.page import embed_json, render_page
from tests.chromium import BINARY, Chromium
from tests.deploy.tools.trace.traced_run import make_run, options, page_data
from tests.tiny import save_teacher, tiny_model

NASTY = """</script><script>document.title="broken"</script><b>'"&amp;\u2028<!--"""


def test_embedded_json_gives_the_record_back_and_cannot_end_its_element() -> None:
    record = {"prompt": NASTY, "tokens": {"1": "{{data}}", "2": "ü🙂"}}
    text = embed_json(record)
    assert json.loads(text) == record
    assert not re.search(r"[<>&\u2028\u2029]", text)
    page = render_page(record, "run {{data}} <b>")
    assert page.count("</script>") == 2
    assert "<title>run {{data}} &lt;b&gt;</title>" in page


needs_browser = pytest.mark.skipif(BINARY is None, reason="no chromium or google-chrome on PATH")


@needs_browser
def test_page_in_a_browser(tmp_path, chain_teacher) -> None:
    """Keys, buttons, the slider and the address change the step, and the page shows the values of the data."""
    run = make_run(tmp_path, chain_teacher, "absolute")
    run_trace(run, options(prompts=["12+3-4=", "5+6="]), Console(quiet=True))
    page = run / "trace.html"
    entry = page_data(page)["trajectories"][0]
    total = entry["denoising_steps"]
    with Chromium(tmp_path / "profile") as browser:
        browser.open(page)
        cards = "Array.from(document.querySelectorAll('#cards .card'), c => c.innerText)"
        # 7 prompt tokens on the absolute grid: three of them share the first block.
        assert browser.ask("document.querySelectorAll('#cards .card').length") == 4
        assert [("prompt" in card) for card in browser.ask(cards)] == [True, True, True, False]
        first_mask = entry["blocks"][0]["steps"][0]["at"][0]
        number = browser.ask("document.querySelector('#cards .number').textContent")
        assert float(number.removesuffix(" nats")) == pytest.approx(first_mask[4], rel=0.06)
        assert where(browser) == f"step 1 of {total}, block 1 of {len(entry['blocks'])}"

        browser.press("ArrowRight")
        assert where(browser).startswith("step 2 ")
        browser.press("ArrowRight", shift=True)
        assert "block 3 " in where(browser)
        browser.press("ArrowLeft")
        browser.click("#back")
        browser.click("#next")
        second = where(browser)
        assert "block 2 " in second
        assert browser.ask("location.hash") == f"#trajectory=1&step={second.split()[1]}"
        browser.press("End")
        assert where(browser) == f"done: {total} steps, {len(entry['blocks'])} blocks"
        assert browser.ask("document.querySelectorAll('#text .masked, #text .future').length") == 0
        assert browser.ask("document.querySelectorAll('#text .chip').length") == len(entry["response_ids"])
        assert browser.ask("document.querySelector('#final').textContent") == entry["prompt"] + entry["response"]
        browser.press("Home")
        browser.ask("document.querySelector('#speed').value = 16")
        browser.press(" ")
        browser.ask("new Promise(done => setInterval(() => playing === null && done(), 20))")
        assert where(browser).startswith("done: ")

        browser.open(page, "#trajectory=2&step=3")
        assert where(browser).startswith("step 3 ")
        assert browser.ask("document.querySelector('#prompt').textContent") == "5+6="
        browser.ask("{ const s = document.querySelector('#slider'); s.value = 0; s.dispatchEvent(new Event('input')) }")
        assert where(browser).startswith("step 1 ")
        assert browser.problems("file:") == []


@needs_browser
def test_no_text_becomes_markup(tmp_path, chain_teacher) -> None:
    """A page on which every token's text, the prompt and the paths are hostile."""
    run = make_run(tmp_path, chain_teacher, "response")
    run_trace(run, options(prompts=["12+3-4="]), Console(quiet=True))
    data = page_data(run / "trace.html")
    data["tokens"] = dict.fromkeys(data["tokens"], NASTY)
    data["run"] = data["trajectories"][0]["prompt"] = data["trajectories"][0]["response"] = NASTY
    page = tmp_path / "nasty.html"
    page.write_text(render_page(data, NASTY), encoding="utf-8")
    with Chromium(tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.ask("document.querySelector('#final').textContent") == NASTY * 2
        assert browser.ask("document.title") == NASTY
        assert browser.ask("document.querySelectorAll('script').length") == 2
        assert browser.ask("document.querySelector('#cards b, #text b, dd b')") is None
        browser.press("End")
        assert where(browser).startswith("done: ")
        assert browser.problems("file:") == []


@needs_browser
def test_a_long_response_redraws_only_what_changed(tmp_path) -> None:
    """A page of 1,200 tokens is small, and one step redraws one or two blocks."""
    teacher = save_teacher(tmp_path / "teacher")
    long = tiny_model(0, vocab_size=17, context=2048)
    long.config.eos_token_id = long.generation_config.eos_token_id = 16  # seldom sampled
    long.save_pretrained(teacher)
    run = make_run(tmp_path, teacher, "response", max_new_tokens=1200)
    run_trace(run, options(prompts=["1+2="], temperature=0.0, top=5), Console(quiet=True))
    page = run / "trace.html"
    entry = page_data(page)["trajectories"][0]
    assert entry["response_length"] == 1200
    assert page.stat().st_size < 1_000_000
    with Chromium(tmp_path / "profile") as browser:
        browser.open(page, "#step=600")
        assert browser.ask("document.querySelectorAll('#text .block').length") == 300
        drawn = browser.ask(
            "new Promise(done => { let n = 0; const watch = new MutationObserver(all => { n += all.length });"
            "watch.observe(document.querySelector('#text'), {childList: true, subtree: true}); go(601);"
            "setTimeout(() => done(n), 0) })"
        )
        assert 0 < drawn <= 2
        assert browser.problems("file:") == []


def where(browser: Chromium) -> str:
    return browser.ask("document.querySelector('#where').textContent")
