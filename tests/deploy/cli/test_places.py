"""Places that cannot be written, and run directories that are in use, are refused before anything starts.

These tests may run as root, who can write nearly everywhere: so they name places below a file, links to themselves and
names that are too long. `pytest tests/deploy/cli/test_places.py`
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from opdlm.common.checkpoint import save_checkpoint
from opdlm.common.config import dump_config, load_config
from opdlm.common.files import check_file, check_folder
from opdlm.deploy.run.lock import RunLock
from opdlm.deploy.run.paths import absolute_paths
from tests.deploy.cli.test_cli import opdlm, run_file  # noqa: F401  the fixture

BAD = ["below a file", "a link to itself", "too long", "in /proc"]


@pytest.fixture(params=BAD)
def bad(request, tmp_path) -> Path:
    """A path at which nothing can be made."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "link")
    names = ["file/new", "link/new", "x" * 256, "/proc/opdlm/new"]
    return tmp_path / names[BAD.index(request.param)]


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch) -> None:
    """Neither Ray nor a model may be touched: each of them takes seconds to minutes."""

    def start(*_, **__):
        raise AssertionError("started before the place was checked")

    for name in ("train.preflight", "train.connect", "compare.train", "plan.make_plan", "compare.preflight"):
        monkeypatch.setattr(f"opdlm.deploy.run.{name}", start)
    monkeypatch.setattr("opdlm.deploy.tools.pretrain.build_model", start)
    monkeypatch.setattr("opdlm.deploy.tools.trace.command.load_model", start)
    monkeypatch.setattr("opdlm.common.model.convert.read_shards", start)
    monkeypatch.setattr("opdlm.deploy.evaluate.commands.CheckpointDecoder", start)


def refused(*arguments: object) -> str:
    text = opdlm(*arguments, code=2)
    assert text.count("opdlm: ") == 1
    assert "Traceback" not in text
    return text


def contents(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def test_a_run_directory_that_cannot_be_written(run_file, bad, tmp_path) -> None:  # noqa: F811
    before = contents(tmp_path)
    for how in ([], ["--dry-run"], ["--dump-rollouts"]):
        text = refused("train", run_file, *how, "--set", f"run.dir={bad}")
        assert text.startswith("opdlm: run.dir: ")
        assert "cannot be written" in text
    assert contents(tmp_path) == before


def test_a_comparison_that_cannot_be_written(run_file, bad, tmp_path) -> None:  # noqa: F811
    before = contents(tmp_path)
    assert f"--out: {bad} cannot be written" in refused("compare", run_file, "--out", bad)
    assert contents(tmp_path) == before


def test_new_folders_that_cannot_be_written(chain_teacher, bad, tmp_path) -> None:
    before = contents(tmp_path)
    assert f"convert: {bad} " in refused("convert", chain_teacher, bad)
    assert f"export: {bad} " in refused("export", chain_teacher, bad, "--layout", "qwen3")
    assert f"pretrain: {bad} " in refused("pretrain", bad, "--task", "chain")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "exists; give a new folder" in refused("convert", chain_teacher, tmp_path / "link")
    assert contents(tmp_path) == before


def test_results_that_cannot_be_written(chain_teacher, run_file, bad, tmp_path) -> None:  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(run_file.read_text())
    before = contents(tmp_path)
    for command, option, file in (
        (("eval", chain_teacher, "--task", "chain"), "--output", bad),
        (("sweep", chain_teacher, "--task", "chain"), "--out", bad.with_name(bad.name + ".png")),
        (("trace", run), "--out", bad),
        (("plan", run_file), "--json", bad),
    ):
        assert refused(*command, option, file).startswith(f"opdlm: {option}: {file} ")
    assert contents(tmp_path) == before


def test_given_responses_that_cannot_be_kept(run_file, bad) -> None:  # noqa: F811
    settings = ("objective.kind=off_policy_kd", f"offline.cache={bad}")
    text = refused("train", run_file, *(part for setting in settings for part in ("--set", setting)))
    assert text.startswith("opdlm: offline.cache: ")


def test_checks_leave_nothing_behind_and_pass_where_things_can_be_made(tmp_path) -> None:
    check_folder(tmp_path / "a" / "b", "run.dir")
    check_folder(tmp_path, "run.dir")
    check_file(tmp_path / "a" / "b.json", "--json")
    check_file(tmp_path / "b.json", "--json")
    assert list(tmp_path.iterdir()) == []


def held_run(file: Path, run: Path) -> None:
    """A run with a checkpoint, as `opdlm train FILE` makes it."""
    state = {"rounds": 1, "optimizer_steps": 1, "data_digest": "d"}
    save_checkpoint(run / "checkpoints", state, lambda folder: None, keep=1)
    (run / "config.yaml").write_text(dump_config(absolute_paths(load_config(file))))


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_another_run_in_the_directory_is_refused_before_anything_starts(run_file, tmp_path, how) -> None:  # noqa: F811
    assert "holds no run; start it without --resume" in refused("train", run_file, "--resume", *how)
    held_run(run_file, tmp_path / "run")
    before = contents(tmp_path)
    assert "already holds a run (1 checkpoints)" in refused("train", run_file, *how)
    text = refused("train", run_file, "--resume", *how, "--set", "learner.batch_size=4")
    assert "holds a run of another config: learner.batch_size (was 8, now 4)" in text
    assert contents(tmp_path) == before


def test_a_resume_beside_a_live_run_is_refused(run_file, tmp_path) -> None:  # noqa: F811
    """The run is a process that holds the lock. Reading commands go on."""
    run = tmp_path / "run"
    held_run(run_file, run)
    code = (
        "import sys; from pathlib import Path; from opdlm.deploy.run.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('taken', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(run)], text=True, **pipes) as live:
        assert live.stdout.readline() == "taken\n"
        before = contents(run)
        for how in (["--resume"], [], ["--resume", "--dry-run"]):
            text = refused("train", run_file, *how)
            assert f"run.dir: {run} is in use by process {live.pid} on " in text
            assert f"kill -TERM {live.pid}" in text
        with RunLock(tmp_path / "compared"):
            pass
        out = tmp_path / "comparison"
        (out / "opd-seed0").parent.mkdir()
        (out / "opd-seed0").symlink_to(run)
        assert f"is in use by process {live.pid}" in refused("compare", run_file, "--out", out)
        assert contents(run) == before
        live.stdin.close()
    assert not (run / "lock.json").exists()
