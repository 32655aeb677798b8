"""The trace of lossless decoding against a direct computation. `pytest tests/deploy/tools/trace/test_drafts.py`"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from opdlm.common.model.adapters import adapter_parameters, write_noisy_adapters
from opdlm.common.model.load import load_model
from opdlm.deploy.evaluate.generation import Model
from opdlm.deploy.tools.generate import run_generate
from opdlm.deploy.tools.trace.command import run_trace
from tests.chromium import BINARY, Chromium
from tests.deploy.tools.trace.traced_run import make_lossless_run, options, page_data
from tests.oracles import draft_logits

SIZE = 4


@pytest.fixture
def run(tmp_path, chain_teacher) -> Any:
    """A lossless run whose drafts are often right and often wrong."""
    run, student = make_lossless_run(tmp_path, chain_teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapter_parameters(student):
            parameter.normal_(std=0.2)
    write_noisy_adapters(student, run / "student_init")
    return run


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_and_figures_equal_a_direct_computation(run, chain_teacher, temperature) -> None:
    run_trace(run, options(prompts=["12+3-4=", "5+6="], samples=3, temperature=temperature), Console(quiet=True))
    data = page_data(run / "trace.html")
    assert data["settings"]["strategy"] == "verified", "what is usual for a lossless student"
    student, teacher = load_model(run / "student_init"), load_model(chain_teacher)
    mask, fates = student.config.mask_token_id, set()
    for entry in data["trajectories"]:
        prompt, response, length = entry["prompt_ids"], entry["response_ids"], entry["response_length"]
        with torch.no_grad():
            said = teacher(input_ids=torch.tensor([prompt + response])).logits[0].float()[len(prompt) - 1 :]
        known = 0
        for number, block in enumerate(entry["blocks"], start=1):
            (step,) = block["steps"]
            assert (step["step"], block["first"]) == (number, known)
            now = [place for place in range(length) if entry["reveal_step"][place] == number]
            assert [p[0] for p in step["at"] if p[3]] == now == list(range(known, known + block["count"]))
            behind = None
            if known:
                before = prompt + response[: known - 1]  # drafts are made before the step's own token is known
                behind = draft_logits(student, before, SIZE, mask)[len(before) :]
            for place, token, confidence, revealed, kl, tops, wrong in step["at"]:
                drafts = 0 if behind is None else SIZE - 1
                own = wrong is not None or place == known + drafts
                assert not own or place == now[-1]
                assert own or place != now[-1] or place == length - 1, "only the end can cut the token behind"
                assert not revealed or token == response[place]
                if place < known + drafts and behind is not None:
                    logits = behind[place - known]
                    target, ours = said[place].log_softmax(-1), logits[:mask].log_softmax(-1)
                    assert kl == pytest.approx(float((target.exp() * (target - ours)).sum()), abs=2e-5)
                    assert tops[1::2] == pytest.approx(ours.exp().topk(4).values, abs=1e-4)
                    drafted = wrong if own else token
                    if temperature == 0:
                        assert drafted == tops[0]
                    chance = said[place].softmax(-1)[token] if own else ours.exp()[drafted]
                    assert confidence == pytest.approx(float(chance), abs=1e-4)
                    fates.add("wrong" if own else "right" if revealed else "behind a wrong one")
                else:
                    assert own
                    assert (kl, tops, wrong) == (None, [], None)
                    fates.add("no draft")
                assert entry["teacher"][place][::2] == said[place].topk(4).indices.tolist()
            known += block["count"]
        assert known == length
    assert fates == {"wrong", "right", "behind a wrong one", "no draft"}, "the run shows every case"


@pytest.mark.skipif(BINARY is None, reason="no chromium or google-chrome on PATH")
def test_page_in_a_browser(run, tmp_path) -> None:
    """Each step's cards say what became of each draft."""
    run_trace(run, options(prompts=["12+3-4="], temperature=1.0), Console(quiet=True))
    (entry,) = page_data(run / "trace.html")["trajectories"]
    cards = "Array.from(document.querySelectorAll('#cards .card'), c => c.innerText)"
    with Chromium(tmp_path / "profile") as browser:
        browser.open(run / "trace.html")
        for number, block in enumerate(entry["blocks"], start=1):
            (step,) = block["steps"]
            place = browser.ask("document.querySelector('#where').textContent")
            assert place == f"step {number} of {len(entry['blocks'])}, block {number} of {len(entry['blocks'])}"
            shown = browser.ask(cards)
            assert len(shown) == len(step["at"])
            for card, (_, _, _, revealed, kl, _, wrong) in zip(shown, step["at"], strict=True):
                own = wrong is not None or kl is None
                fate = "draft, thrown away" if not revealed else "the teacher's own token" if own else "draft, right"
                assert fate in card
                assert ("was wrong" in card) == (wrong is not None)
                assert ("no draft" in card) == (kl is None)
            browser.press("ArrowRight")
        assert browser.ask("document.querySelectorAll('#text .chip').length") == entry["response_length"]
        assert browser.problems("file:") == []


def test_generate_shows_the_steps_too(run) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    run_generate(run / "student_init", ["12+3-4="], None, True, console)
    lines = console.export_text().splitlines()
    (answer,) = Model(run / "student_init").generate(["12+3-4="])
    assert "grey: drafts" in lines[0]
    assert sum(line[:4].strip().isdigit() for line in lines) == answer.denoising_steps
