"""Runs to trace, and the data of the pages."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from opdlm.common.config import config_from_dict, dump_config, load_config
from opdlm.common.model.adapters import NoisyAdapters, write_noisy_adapters
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.tools.trace.command import TraceOptions


def options(**changed) -> TraceOptions:
    given = {
        "student": None,
        "prompts": [],
        "samples": None,
        "strategy": None,
        "threshold": None,
        "temperature": None,
    }
    return TraceOptions(**given | {"max_new_tokens": None, "top": 4, "out": None} | changed)


def make_run(folder: Path, teacher: Path, grid: str, **rollout) -> Path:
    """A run directory as `opdlm train` leaves it, with a student whose weights differ from its teacher's."""
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
    convert_checkpoint(teacher, run / "student", rollout.get("block_size", 4), grid)
    student = load_model(run / "student")
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    tokenizer = load_tokenizer(run / "student")
    student.save_pretrained(run / "student")
    tokenizer.save_pretrained(run / "student")
    return run


def make_lossless_run(folder: Path, teacher: Path) -> tuple[Path, Any]:
    """The directory of a lossless run that has only begun, and its start student, whose adapters change nothing."""
    run = make_run(folder, teacher, "response")
    noisy = "{logit_shift: true, context: causal, lora: {rank: 2, tokens: noisy}}"
    config = load_config(run / "config.yaml", [f"model={noisy}", f"model.teacher={teacher}"])
    (run / "config.yaml").write_text(dump_config(config))
    shutil.rmtree(run / "student")
    convert_checkpoint(teacher, run / "student_init", 4, "response", None, True, "causal")
    student = load_model(run / "student_init")
    NoisyAdapters(student, config.model.lora, require_mask(read_facts(run / "student_init")), seed=0)
    write_noisy_adapters(student, run / "student_init")
    return run, student


def page_data(page: Path) -> dict:
    """The page's JSON, found by parsing the HTML as a browser does."""

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
