"""Which student `opdlm trace` decodes with, and its errors. `pytest tests/deploy/tools/trace/test_command.py`"""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from opdlm.common.checkpoint import save_checkpoint
from opdlm.common.config import dump_config, load_config
from opdlm.common.errors import OpdlmError
from opdlm.common.model.adapters import adapter_parameters, add_adapters
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.load import load_model
from opdlm.deploy.cli import app
from opdlm.deploy.tools.trace.command import run_trace
from opdlm.learner.lora import merged_parameters
from tests.deploy.tools.trace.traced_run import make_lossless_run, make_run, options, page_data


def test_dynamic_decoding_is_shown_whatever_the_rollouts_do(tmp_path, chain_teacher) -> None:
    run = make_run(tmp_path, chain_teacher, "response")
    done = CliRunner().invoke(app, ["trace", str(run), "--prompt", "12+3-4="])
    assert done.exit_code == 0, done.output
    assert page_data(run / "trace.html")["settings"]["strategy"] == "low_confidence_dynamic"


def test_prompts_that_are_no_text_and_unknown_characters(tmp_path, chain_teacher) -> None:
    run = make_run(tmp_path, chain_teacher, "response")
    done = CliRunner().invoke(app, ["trace", str(run), "--prompt", "12\udcff"])
    assert done.exit_code == 2
    assert "opdlm: --prompt '12\\udcff' holds a lone surrogate" in done.output
    done = CliRunner().invoke(app, ["trace", str(run), "--prompt", "12×3="], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    assert "unknown characters: 1 in 1 texts" in done.output


def test_an_unfinished_run_shows_its_newest_checkpoint(tmp_path, chain_teacher) -> None:
    run = make_run(tmp_path, chain_teacher, "response")
    finished = load_model(run / "student")
    weights = {name: p.detach().clone() for name, p in finished.named_parameters()}
    run_trace(run, options(out=tmp_path / "finished.html"), Console(quiet=True))
    (run / "student").rename(run / "elsewhere")
    with pytest.raises(OpdlmError, match="has neither student/ nor student_init/"):
        run_trace(run, options(), Console(quiet=True))
    convert_checkpoint(chain_teacher, run / "student_init", 4, "response")
    run_trace(run, options(out=tmp_path / "start.html"), Console(quiet=True))
    state = {"rounds": 3}
    save_checkpoint(run / "checkpoints", state, lambda to: save_file(weights, to / "weights.safetensors"), keep=1)
    run_trace(run, options(out=tmp_path / "checkpoint.html"), Console(quiet=True))
    pages = {name: page_data(tmp_path / f"{name}.html") for name in ("finished", "start", "checkpoint")}
    assert pages["checkpoint"]["student"].endswith("checkpoints/round-000003")
    assert pages["checkpoint"]["trajectories"] == pages["finished"]["trajectories"]
    assert pages["start"]["trajectories"] != pages["finished"]["trajectories"]


def test_a_checkpoint_of_adapters_is_loaded_into_the_start(tmp_path, chain_teacher) -> None:
    """A checkpoint of a LoRA run holds only the adapters; the page shows the same as with the merged weights."""
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


def test_an_unfinished_lossless_run_is_shown(tmp_path, chain_teacher) -> None:
    """Its start has adapters on noisy tokens already; a checkpoint holds the trained ones."""
    run, student = make_lossless_run(tmp_path, chain_teacher)
    run_trace(run, options(prompts=["12+3-4="], out=tmp_path / "start.html"), Console(quiet=True))
    trained = {name: p.detach() + 0.3 for name, p in adapter_parameters(student)}
    save_checkpoint(
        run / "checkpoints", {"rounds": 1}, lambda to: save_file(trained, to / "weights.safetensors"), keep=1
    )
    run_trace(run, options(prompts=["12+3-4="], out=tmp_path / "later.html"), Console(quiet=True))
    start, later = (page_data(tmp_path / f"{name}.html")["trajectories"][0] for name in ("start", "later"))
    assert start["blocks"] != later["blocks"]


def test_mistakes_are_named_and_leave_no_page(tmp_path, chain_teacher) -> None:
    run = make_run(tmp_path, chain_teacher, "response")
    for folder, changed, message in [
        (tmp_path, {}, "is no run directory: it has no config.yaml"),
        (run, {"prompts": ["1" * 200]}, r"--prompt '1+': 200 tokens; expected 1 to 114"),
        (run, {"prompts": [""]}, "--prompt '': 0 tokens"),
        (run, {"max_new_tokens": 500}, "--max-new-tokens: 500 leaves no room for a prompt"),
        (run, {"student": chain_teacher}, "has no mask token; convert it first"),
        (run, {"out": tmp_path / "no" / "page.html"}, "--out: .*page.html lies in .*, which does not exist"),
    ]:
        with pytest.raises(OpdlmError, match=message):
            run_trace(folder, options(**changed), Console(quiet=True))
    assert list(run.glob("*.html")) == []
