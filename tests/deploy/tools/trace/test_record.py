"""The figures of `opdlm trace` against a direct computation. `pytest tests/deploy/tools/trace/test_record.py`"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from opdlm.common.grid import BlockGrid
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.tools.trace.command import run_trace
from tests.deploy.tools.trace.traced_run import make_run, options, page_data
from tests.oracles import full_forward
from tests.tiny import save_teacher, tiny_model


def teacher_with_spare_rows(folder: Path) -> Path:
    """A teacher with a spare row for the mask token, like Qwen3: the student's vocabulary is not larger."""
    save_teacher(folder)
    eos = load_model(folder).config.eos_token_id
    model = tiny_model(3, vocab_size=24)
    model.config.eos_token_id = model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("grid", ["absolute", "response"])
@pytest.mark.parametrize("spare_rows", [False, True])
def test_figures_equal_a_direct_computation(tmp_path, chain_teacher, grid, spare_rows) -> None:
    """Rebuilds each state from the final text and the reveal steps, and runs one uncached forward of each model."""
    teacher_folder = teacher_with_spare_rows(tmp_path / "teacher") if spare_rows else chain_teacher
    run = make_run(tmp_path, teacher_folder, grid)
    run_trace(run, options(prompts=["12+3-4=", "5+6="], samples=2, temperature=1.0), Console(quiet=True))
    data = page_data(run / "trace.html")
    student, teacher = load_model(run / "student"), load_model(teacher_folder)
    tokenizer, mask = load_tokenizer(run / "student"), student.config.mask_token_id
    teacher_vocabulary = len(load_tokenizer(teacher_folder))
    assert student.config.vocab_size == teacher.config.vocab_size + (0 if spare_rows else 1)
    assert len(data["trajectories"]) == 4
    block_grid, compared = BlockGrid(4, grid), 0
    for entry in data["trajectories"]:
        prompt, response, reveal = entry["prompt_ids"], entry["response_ids"], entry["reveal_step"]
        final, length = prompt + response, entry["response_length"]
        assert entry["response"] == tokenizer.decode(response[:length], skip_special_tokens=True)
        assert entry["prompt"] == tokenizer.decode(prompt)
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([final])).logits[0].float()
            wanted = logits[:, :teacher_vocabulary].log_softmax(-1)
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
                    at[[mask, *range(mask, len(at))]] = float("-inf")
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
