"""`opdlm trace`: the page's figures against a direct computation, and the page in a browser.

`pytest tests/deploy/tools/test_trace.py`; the browser's tests need chromium or google-chrome on PATH.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from opdlm.common.checkpoint import save_checkpoint
from opdlm.common.config import config_from_dict, dump_config, load_config
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.convert import convert
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.tools.trace.command import TraceOptions, run_trace
from opdlm.deploy.tools.trace.page import embed_json, render_page
from opdlm.learner.lora import add_adapters, merged_parameters
from tests.chromium import BINARY, Chromium
from tests.oracles import full_forward
from tests.tiny import save_teacher, tiny_model

NASTY = """</script><script>document.title="broken"</script><b>'"&amp;\u2028<!--"""


def options(**changed) -> TraceOptions:
    given = {"student": None, "prompts": [], "samples": None, "strategy": None, "threshold": None, "temperature": None}
    return TraceOptions(**given | {"max_new_tokens": None, "top": 4, "out": None} | changed)


def make_run(folder: Path, teacher: Path, grid: str, **rollout) -> Path:
    """A run directory as `train` leaves it, with a student that is not its teacher."""
    run = folder / "run"
    rollout = {"block_grid": grid, "max_new_tokens": 11, "strategy": "low_confidence_static"} | rollout
    config = {
        "run": {"dir": str(run)},
        "model": {"teacher": str(teacher), "dtype": "float32"},
        "data": {"task": "chain", "prompts": 20},
        "rollout": rollout,
        "teacher": {"dtype": "float32"},
    }
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config_from_dict(config)))
    convert(teacher, run / "student", rollout.get("block_size", 4), grid)
    student = load_model(run / "student")
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    tokenizer = load_tokenizer(run / "student")
    student.save_pretrained(run / "student")
    tokenizer.save_pretrained(run / "student")
    return run


def teacher_with_spare_rows(folder: Path) -> Path:
    """A teacher whose vocabulary has room for the mask token, as Qwen3's has: the student's is no larger."""
    save_teacher(folder)
    eos = load_model(folder).config.eos_token_id
    model = tiny_model(3, vocab_size=24)
    model.config.eos_token_id = model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    return folder


def page_data(page: Path) -> dict:
    """The page's JSON, found as a browser finds it: by parsing the HTML."""

    class Finder(HTMLParser):
        inside, text = False, ""

        def handle_starttag(self, tag, attrs):
            self.inside = tag == "script" and ("id", "data") in attrs

        def handle_endtag(self, tag):
            self.inside = False

        def handle_data(self, data):
            self.text += data if self.inside else ""

    finder = Finder()
    finder.feed(page.read_text())
    return json.loads(finder.text)


@pytest.mark.parametrize("grid", ["absolute", "response"])
@pytest.mark.parametrize("spare_rows", [False, True])
def test_figures_equal_a_direct_computation(tmp_path, chain_teacher, grid, spare_rows) -> None:
    """Every state rebuilt from the final text and the reveal steps, then one uncached forward of each model."""
    teacher_folder = teacher_with_spare_rows(tmp_path / "teacher") if spare_rows else chain_teacher
    run = make_run(tmp_path, teacher_folder, grid)
    run_trace(run, options(prompts=["12+3-4=", "5+6="], samples=2, temperature=1.0), Console(quiet=True))
    data = page_data(run / "trace.html")
    student, teacher = load_model(run / "student"), load_model(teacher_folder)
    tokenizer, mask = load_tokenizer(run / "student"), student.config.mask_token_id
    teacher_vocabulary = teacher.config.vocab_size
    assert student.config.vocab_size == teacher_vocabulary + (0 if spare_rows else 1)
    assert len(data["trajectories"]) == 4
    block_grid, compared = BlockGrid(4, grid), 0
    for entry in data["trajectories"]:
        prompt, response, reveal = entry["prompt_ids"], entry["response_ids"], entry["reveal_step"]
        final, length = prompt + response, entry["response_length"]
        assert entry["response"] == tokenizer.decode(response[:length], skip_special_tokens=True)
        assert entry["prompt"] == tokenizer.decode(prompt)
        with torch.no_grad():
            wanted = teacher(input_ids=torch.tensor([final])).logits[0].float().log_softmax(-1)
        shown = set()
        for block in entry["blocks"]:
            figures = []
            for step in block["steps"]:
                state = prompt + [t if s < step["step"] else mask for t, s in zip(response, reveal, strict=True)]
                end = len(prompt) + block["first"] + block["count"]
                logits = full_forward(student, state[:end], block_grid, len(prompt))
                assert [p[0] for p in step["at"]] == [
                    i for i in range(block["first"], block["first"] + block["count"]) if reveal[i] >= step["step"]
                ]
                for place, candidate, confidence, revealed, kl, tops in step["at"]:
                    at = logits[len(prompt) + place]
                    if place < length:
                        target = wanted[len(prompt) + place - 1]
                        ours = at[:teacher_vocabulary].log_softmax(-1)
                        direct = float((target.exp() * (target - ours)).sum())
                        assert kl == pytest.approx(direct, abs=2e-5)
                        assert entry["teacher"][place][::2] == target.topk(4).indices.tolist()
                        assert entry["teacher"][place][1::2] == pytest.approx(target.exp().topk(4).values, abs=1e-4)
                        figures.append(direct)
                        compared += 1
                    else:
                        assert kl is None
                    at[mask] = float("-inf")
                    chances = at.softmax(-1)
                    assert confidence == pytest.approx(float(chances[candidate]), abs=1e-4)
                    assert tops[1::2] == pytest.approx(chances.topk(4).values, abs=1e-4)
                    assert chances[tops[::2]].tolist() == pytest.approx(tops[1::2], abs=1e-4)
                    if revealed:
                        assert (response[place], reveal[place]) == (candidate, step["step"])
                        shown.add(place)
            counted = len([i for i in range(block["first"], block["first"] + block["count"]) if i < length])
            assert block["tokens_per_step"] == pytest.approx(counted / len(block["steps"]), abs=1e-4)
            if figures:
                assert block["mean_kl"] == pytest.approx(sum(figures) / len(figures), abs=2e-5)
        assert shown == set(range(len(response))), "all positions must be revealed in the end"
        assert {str(t) for t in final} <= data["tokens"].keys()
    assert compared > 40


def test_an_unfinished_run_shows_its_newest_checkpoint(tmp_path, chain_teacher) -> None:
    run = make_run(tmp_path, chain_teacher, "response")
    finished = load_model(run / "student")
    weights = {name: p.detach().clone() for name, p in finished.named_parameters()}
    run_trace(run, options(out=tmp_path / "finished.html"), Console(quiet=True))
    (run / "student").rename(run / "elsewhere")
    with pytest.raises(OpdlmError, match="has neither student/ nor student_init/"):
        run_trace(run, options(), Console(quiet=True))
    convert(chain_teacher, run / "student_init", 4, "response")
    run_trace(run, options(out=tmp_path / "start.html"), Console(quiet=True))
    state = {"rounds": 3}
    save_checkpoint(run / "checkpoints", state, lambda to: save_file(weights, to / "weights.safetensors"), keep=1)
    run_trace(run, options(out=tmp_path / "checkpoint.html"), Console(quiet=True))
    pages = {name: page_data(tmp_path / f"{name}.html") for name in ("finished", "start", "checkpoint")}
    assert pages["checkpoint"]["student"].endswith("checkpoints/round-000003")
    assert pages["checkpoint"]["trajectories"] == pages["finished"]["trajectories"]
    assert pages["start"]["trajectories"] != pages["finished"]["trajectories"]


def test_a_checkpoint_of_adapters_is_put_into_the_start(tmp_path, chain_teacher) -> None:
    """A checkpoint of a LoRA run holds the adapters alone; the page shows what the merged weights would do."""
    run = make_run(tmp_path, chain_teacher, "response")
    config = load_config(run / "config.yaml", ["model.lora={rank: 2}"])
    (run / "config.yaml").write_text(dump_config(config))
    shutil.move(run / "student", run / "student_init")
    tuned = load_model(run / "student_init")
    add_adapters(tuned, config.model.lora, seed=0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter.add_(0.2 * ("lora_B" in name))
    trained = {name: p.detach().clone() for name, p in tuned.named_parameters() if p.requires_grad}
    merged = {n: p.clone() for n, p in merged_parameters(tuned, lambda parameters: contextlib.nullcontext())}
    save_checkpoint(
        run / "checkpoints", {"rounds": 1}, lambda to: save_file(trained, to / "weights.safetensors"), keep=1
    )
    shutil.copytree(run / "student_init", tmp_path / "merged")
    plain = load_model(tmp_path / "merged")
    plain.load_state_dict(merged)
    plain.save_pretrained(tmp_path / "merged")
    run_trace(run, options(prompts=["12+3-4="]), Console(quiet=True))
    run_trace(run, options(prompts=["12+3-4="], student=tmp_path / "merged", out=tmp_path / "merged.html"), Console())
    ours, direct = (page_data(page)["trajectories"][0] for page in (run / "trace.html", tmp_path / "merged.html"))
    assert ours["response_ids"] == direct["response_ids"]
    assert ours["mean_kl"] == pytest.approx(direct["mean_kl"], rel=1e-4)


def test_mistakes_are_named_and_leave_no_page(tmp_path, chain_teacher) -> None:
    run = make_run(tmp_path, chain_teacher, "response")
    for folder, changed, message in [
        (tmp_path, {}, "is no run directory: it has no config.yaml"),
        (run, {"prompts": ["1" * 200]}, r"--prompt '1+': 200 tokens; expected 1 to 114"),
        (run, {"prompts": [""]}, "--prompt '': 0 tokens"),
        (run, {"max_new_tokens": 500}, "--max-new-tokens: 500 leaves no room for a prompt"),
        (run, {"student": chain_teacher}, "has no mask token; convert it first"),
        (run, {"out": tmp_path / "no" / "page.html"}, "--out .*: expected a file name in a folder that exists"),
    ]:
        with pytest.raises(OpdlmError, match=message):
            run_trace(folder, options(**changed), Console(quiet=True))
    assert list(run.glob("*.html")) == []


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
    """Keys, buttons, the slider and the address move it; what it shows is what the data says."""
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
        place = entry["blocks"][0]["steps"][0]["at"][0]
        number = browser.ask("document.querySelector('#cards .number').textContent")
        assert float(number.removesuffix(" nats")) == pytest.approx(place[4], rel=0.06)
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
        assert problems(browser) == []


@needs_browser
def test_nothing_a_prompt_holds_becomes_markup(tmp_path, chain_teacher) -> None:
    """The same page with another vocabulary: every token's text, the prompt and the paths are hostile."""
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
        assert problems(browser) == []


@needs_browser
def test_a_thousand_tokens_stay_quick_to_read(tmp_path) -> None:
    """A page of 1,200 tokens: small, and a step draws only what changed."""
    teacher = save_teacher(tmp_path / "teacher")
    long = tiny_model(0, vocab_size=17, context=2048)
    long.config.eos_token_id = long.generation_config.eos_token_id = 16  # seldom drawn
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
        assert problems(browser) == []


def where(browser: Chromium) -> str:
    return browser.ask("document.querySelector('#where').textContent")


def problems(browser: Chromium) -> list[dict]:
    """Exceptions, errors in the log, and requests to anywhere but the file itself."""
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    bad = [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    return bad + [{"url": url} for url in requests if not url.startswith("file:")]
