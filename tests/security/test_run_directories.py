"""Run files, checkpoints, kept rollouts and given responses are read as data: they execute no code.

`pytest tests/security/test_run_directories.py`
"""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from opdlm.common.checkpoint import latest_checkpoint, save_checkpoint
from opdlm.common.config import load_config
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.export import export
from opdlm.common.model.convert import convert_checkpoint
from opdlm.deploy.run.directory import held_config
from opdlm.deploy.run.given_responses import Recipe, read_responses
from opdlm.learner.rollout_files import read_header, round_file
from tests.security.attacks import edit_json, table_with_pickles, yaml_attack


@pytest.mark.parametrize("kind", ["yaml", "pickle"])
def test_a_malicious_run_file_is_an_error_in_one_line(tmp_path, malicious_pickle, marker, kind) -> None:
    run = tmp_path / "run"
    run.mkdir()
    file = run / "config.yaml"
    file.write_bytes(yaml_attack(marker).encode() if kind == "yaml" else malicious_pickle)
    with pytest.raises(ConfigError, match=r"run file: .*config.yaml is not (YAML|text)") as caught:
        load_config(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(OpdlmError, match=r"config.yaml is not (YAML|text)"):
        held_config(run)


def test_a_malicious_override_is_refused(tmp_path, marker) -> None:
    good = tmp_path / "good.yaml"
    good.write_text("model: {teacher: t}\ndata: {path: p}\n")
    override = f"run.dir=!!python/object/apply:os.mkdir [{str(marker)!r}]"
    with pytest.raises(ConfigError, match="the value is not YAML"):
        load_config(good, [override])


@pytest.mark.parametrize("file", ["config.yaml", "report.json"])
def test_export_reads_a_run_as_data(model, tmp_path, malicious_pickle, marker, file) -> None:
    run = tmp_path / "run"
    convert_checkpoint(model, run / "student", 4, "absolute")
    (run / "config.yaml").write_text("model: {teacher: t}\n")
    (run / file).write_bytes(yaml_attack(marker).encode() if file == "config.yaml" else malicious_pickle)
    with pytest.raises(OpdlmError, match=rf"{file} is not"):
        export(run / "student", tmp_path / "out", "qwen3")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_pickle_in_a_checkpoint_is_not_loaded_though_its_checksum_fits(
    tmp_path, malicious_pickle, marker, file, caplog
) -> None:
    def write(folder: Path) -> None:
        save_file({"w": np.ones(3, np.float32)}, folder / "weights.safetensors")
        save_file({"exp_avg.w": np.ones(3, np.float32)}, folder / "optimizer.safetensors", {"step": "1"})

    root = tmp_path / "checkpoints"
    folders = [save_checkpoint(root, {"rounds": rounds}, write, keep=5) for rounds in (1, 2)]

    def replace_by_pickle(folder: Path) -> None:
        (folder / file).write_bytes(malicious_pickle)
        if file != "manifest.json":
            entry = {"bytes": len(malicious_pickle), "crc32": zlib.crc32(malicious_pickle)}
            edit_json(folder / "manifest.json", **{file: entry})

    replace_by_pickle(folders[1])
    with caplog.at_level(logging.WARNING):
        found = latest_checkpoint(root)
    assert found is not None
    assert found.rounds == 1
    assert "round-000002 is damaged" in caplog.text
    replace_by_pickle(folders[0])
    with pytest.raises(OpdlmError, match="no whole checkpoint among 2") as caught:
        latest_checkpoint(root)
    assert "\n" not in str(caught.value)


def test_kept_rollouts_that_are_or_hold_a_pickle_are_refused(tmp_path, malicious_pickle, marker) -> None:
    file = round_file(tmp_path, 0)
    file.write_bytes(malicious_pickle)
    with pytest.raises(OpdlmError, match=r"saved rollouts: .* cannot be read"):
        read_header(file)
    for metadata in (malicious_pickle.decode("latin-1"), "[]", json.dumps({"facts": {}, "samples": []})):
        save_file({"a": np.ones(1)}, file, {"rollouts": metadata})
        with pytest.raises(OpdlmError, match=r"saved rollouts: .* cannot be read: its metadata"):
            read_header(file)


def test_given_responses_with_pickles_in_their_metadata_are_refused(tmp_path, malicious_pickle, marker) -> None:
    expected = Recipe("t", "p", [1], 4, 1.0, 0, "float32")
    file = tmp_path / "responses.parquet"
    file.write_bytes(malicious_pickle)
    with pytest.raises(ConfigError, match=r"offline.cache: .* is no file of teacher responses from opdlm"):
        read_responses(file, expected)
    pq.write_table(table_with_pickles(malicious_pickle), file)
    with pytest.raises(ConfigError, match=r"offline.cache: .* is no file of teacher responses from opdlm") as caught:
        read_responses(file, expected)
    assert "\n" not in str(caught.value)
