"""What is exported beside weights: code, card, warnings; refusals. `pytest tests/common/export/test_folder.py`"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdlm.common.errors import OpdlmError
from opdlm.common.export import LAYOUTS, TEMPLATES, engine_warnings, export
from opdlm.common.model.config import read_config
from opdlm.common.model.convert import convert_checkpoint
from tests.tiny import save_teacher


def test_warnings_where_engines_assume_other_values(tmp_path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    convert_checkpoint(teacher, tmp_path / "student", 8, "response")
    lines = export(tmp_path / "student", tmp_path / "sdar", "sdar")
    assert [re.search(r"the (mask token id|block grid|block size) is", line).group(1) for line in lines] == [
        "mask token id",
        "block grid",
        "block size",
    ]
    assert all(line in (tmp_path / "sdar" / "README.md").read_text() for line in lines)
    assert export(tmp_path / "student", tmp_path / "a2d", "a2d-qwen3") == []
    config = read_config(tmp_path / "student")
    config.update({"mask_token_id": 151669, "block_grid": "absolute", "block_size": 4})
    assert engine_warnings(config) == []


def test_the_card_describes_the_run_and_names_no_private_path(tmp_path) -> None:
    run = tmp_path / "run"
    teacher = save_teacher(tmp_path / "secret" / "chain-teacher")
    convert_checkpoint(teacher, run / "student", 4, "absolute")
    convert_checkpoint(teacher, run / "student_init", 4, "absolute")
    config = {
        "model": {"teacher": str(teacher)},
        "data": {"path": "~/private/prompts.jsonl", "files": [str(tmp_path / "more.jsonl")]},
        "learner": {"optimizer": {"lr": 0.0015}},
        "resources": {"ray_address": "ray://10.0.0.7:10001"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "report.json").write_text(json.dumps({"student_exact_match_static": 0.994, "wall_seconds": None}))
    export(run / "student", tmp_path / "a", "a2d-qwen3")
    card = (tmp_path / "a" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert head["base_model"] == "chain-teacher"
    assert {"opdlm", "block-diffusion"} <= set(head["tags"])
    assert "| student exact match static | 0.994 |" in card
    assert "lr: 0.0015" in card
    assert "path: prompts.jsonl" in card
    for private in (str(tmp_path), "secret", "private", "10.0.0.7", str(Path.home()) + "/"):
        assert private not in card, private

    export(run / "student", tmp_path / "b", "qwen3", base_model="Qwen/Qwen3-0.6B")
    assert "base_model: Qwen/Qwen3-0.6B" in (tmp_path / "b" / "README.md").read_text()
    export(run / "student_init", tmp_path / "c", "qwen3")
    assert "0.994" not in (tmp_path / "c" / "README.md").read_text(), "the figures belong to the trained student"


def test_an_unusable_source_is_named_and_leaves_no_files(tmp_path) -> None:
    teacher = save_teacher(tmp_path / "teacher", family="llama")
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    (tmp_path / "there").mkdir()

    def refused(source: str, destination: str, layout: Any, message: str) -> None:
        with pytest.raises(OpdlmError, match=message) as error:
            export(tmp_path / source, tmp_path / destination, layout)
        assert "\n" not in str(error.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["student", "teacher", "there"]
        assert not list((tmp_path / "there").iterdir())

    refused("student", "there", "a2d-llama", "exists; give a new folder")
    for layout in ("a2d-qwen3", "sdar", "qwen2"):
        refused("student", "new", layout, f"found {layout}, but .* is a llama; it can be: a2d-llama, llama")
    refused("teacher", "new", "llama", "has no mask token; convert it first")
    refused("nowhere", "new", "llama", "does not exist; expected a checkpoint")
    raw = json.loads((tmp_path / "student" / "config.json").read_text())
    del raw["block_size"]
    (tmp_path / "student" / "config.json").write_text(json.dumps(raw))
    refused("student", "new", "llama", "names no block_size; write one: opdlm convert .* --block-size N")


def test_every_layout_has_its_code_among_the_templates() -> None:
    for layout in LAYOUTS.values():
        code = "".join((TEMPLATES / file).read_text() for file in layout.files)
        for target in layout.auto_map.values():
            assert f"class {target.partition('.')[2]}(" in code
        assert "opdlm" not in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)
