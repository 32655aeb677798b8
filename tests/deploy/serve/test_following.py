"""`opdlm serve --follow`: a server takes a run's newest student. `pytest tests/deploy/serve/test_following.py`"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opdlm.common.errors import OpdlmError
from opdlm.common.model.load import load_model
from opdlm.deploy.cli import app
from opdlm.deploy.run.saved_student import open_saved_run
from opdlm.deploy.serve.errors import ApiError
from opdlm.deploy.serve.options import ServeOptions
from opdlm.deploy.serve.reloading import Follower
from opdlm.deploy.serve.weights import Weights
from tests.deploy.run.test_saved_student import begin_run, save


def test_a_run_gives_name_number_format_and_blocks(chain_teacher, tmp_path) -> None:
    begin_run(chain_teacher, tmp_path / "mine", rollout={"block_grid": "absolute", "block_size": 2})
    found = ServeOptions(follow=str(tmp_path / "mine")).resolved()
    assert (found.name, found.dtype, found.block_size, found.block_grid) == ("mine", "float32", 2, "absolute")
    assert found.checkpoint == str(tmp_path / "mine" / "student_init")
    given = ServeOptions(follow=str(tmp_path / "mine"), name="other", dtype="bfloat16").resolved()
    assert (given.name, given.dtype) == ("other", "bfloat16")
    for wrong in ({}, {"checkpoint": "a", "follow": "b"}):
        with pytest.raises(OpdlmError, match="give either a checkpoint or --follow RUN"):
            ServeOptions(**wrong).resolved()


def test_a_folder_without_a_run_ends_the_command_with_one_line(tmp_path) -> None:
    done = CliRunner().invoke(app, ["serve", "--follow", str(tmp_path)])
    assert done.exit_code == 2
    assert f"opdlm: {tmp_path} holds no run (no config.yaml)" in done.output


def test_a_look_takes_only_what_is_new_and_says_once_what_hinders_it(chain_teacher, tmp_path, caplog) -> None:
    begin_run(chain_teacher, tmp_path / "mine")
    run = open_saved_run(tmp_path / "mine")
    weights = dict(load_model(run.start).named_parameters())

    class Taking:
        """Takes what it is told to, unless it is closed."""

        current, closed, taken = Weights(str(run.start), 0), False, list[str]()

        async def to(self, folder: str, mark: str) -> int:
            if self.closed:
                raise ApiError(400, "the old weights stay: closed", "reload_failed")
            self.current = Weights(folder, self.current.version + 1, mark)
            self.taken.append(Path(folder).name)
            return 1

    taking = Taking()
    follower = Follower(run, 1, taking)  # type: ignore[arg-type]

    def look(times: int) -> list[str]:
        for _ in range(times):
            asyncio.run(follower.look())
        return taking.taken

    assert look(2) == [], "the engines start with it"
    save(run.folder, 1, weights)
    assert look(2) == ["round-000001"]
    taking.closed = True
    save(run.folder, 2, weights)
    assert look(3)[1:] == []
    assert sum("the old weights stay: closed" in record.message for record in caplog.records) == 1
    taking.closed = False
    assert look(2)[1:] == ["round-000002"]
    save(run.folder, 2, {name: tensor + 1 for name, tensor in weights.items()})
    assert look(2)[2:] == ["round-000002"], "other weights in the same folder"
