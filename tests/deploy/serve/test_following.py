"""`opdlm serve --follow`: a server takes a run's newest student. `pytest tests/deploy/serve/test_following.py`"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from opdlm.common.checkpoint import WEIGHTS
from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.load import load_model
from opdlm.deploy.cli import app
from opdlm.deploy.evaluate.generation import Model
from opdlm.deploy.run.saved_student import open_saved_run
from opdlm.deploy.serve.errors import ApiError
from opdlm.deploy.serve.options import ServeOptions
from opdlm.deploy.serve.reloading import Follower
from opdlm.deploy.serve.weights import Weights
from tests.deploy.run.test_saved_student import begin_run, save
from tests.deploy.serve.served import ask, kill, model, serving, text
from tests.patience import PATIENCE, wait_until
from tests.tiny import save_teacher

TOKENS = 16


@pytest.fixture(scope="module")
def later(tmp_path_factory, chain_teacher) -> list[Path]:
    """Students that a run could train, as model folders."""
    folder, made = tmp_path_factory.mktemp("later"), []
    for seed in (1, 2, 3):
        teacher = save_teacher(folder / f"teacher{seed}", seed)
        convert_checkpoint(teacher, folder / f"student{seed}", block_size=4, block_grid="absolute")
        made.append(folder / f"student{seed}")
    return made


@pytest.fixture
def server(ray_cluster, chain_teacher, tmp_path) -> Iterator[str]:
    """A server that follows a run that has just begun, `tmp_path / "tiny"`."""
    begin_run(chain_teacher, tmp_path / "tiny", rollout={"block_grid": "absolute"})
    options = ServeOptions(follow=str(tmp_path / "tiny"), follow_seconds=0.2, slots=2).resolved()
    with serving(ray_cluster, options) as url:
        yield url


@pytest.mark.ray
def test_a_server_follows_a_run_and_loses_no_request(server, cluster, later, tmp_path) -> None:
    run, prompt = tmp_path / "tiny", "1+2="
    weights = [dict(load_model(folder).named_parameters()) for folder in later]
    texts = [
        Model(folder).generate([prompt], max_new_tokens=TOKENS)[0].text for folder in (run / "student_init", *later)
    ]
    assert len(set(texts)) == 4
    assert (model(server)["checkpoint"], text(ask(server, prompt, TOKENS))) == (str(run / "student_init"), texts[0])

    asked, stop = list[httpx.Response](), threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            asked.append(ask(server, prompt, TOKENS))

    client = threading.Thread(target=keep_asking)
    client.start()
    try:
        first = save(run, 1, weights[0], keep=1)
        wait_until(lambda: model(server)["checkpoint"] == str(first), "the first checkpoint")
        assert text(ask(server, prompt, TOKENS)) == texts[1]
        damaged = save(tmp_path / "aside", 2, weights[1])
        content = (damaged / WEIGHTS).read_bytes()
        (damaged / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        damaged.rename(run / "checkpoints" / damaged.name)
        wait_until(
            lambda: 'opdlm_reloads_total{result="refused"}' in httpx.get(f"{server}/metrics", timeout=PATIENCE).text,
            "a refusal",
        )
        assert (model(server)["checkpoint"], text(ask(server, prompt, TOKENS))) == (str(first), texts[1])
        second = save(run, 2, weights[1], keep=1)  # the run went back; `first` is gone
        wait_until(lambda: model(server)["checkpoint"] == str(second), "the second checkpoint")
        assert text(ask(server, prompt, TOKENS)) == texts[2]
    finally:
        stop.set()
        client.join()
    assert {answer.status_code for answer in asked} == {200}
    assert {text(answer) for answer in asked} <= set(texts)
    kill(cluster, "engine")
    assert text(ask(server, prompt, TOKENS)) == texts[2]
    third = save(run, 2, weights[2])  # the same folder, other weights
    wait_until(lambda: text(ask(server, prompt, TOKENS)) == texts[3], "the weights that came in its place")
    assert model(server)["checkpoint"] == str(third)
    refused = httpx.post(f"{server}/admin/reload", json={"checkpoint": str(later[0])}, timeout=PATIENCE)
    assert refused.status_code == 400
    assert "this server follows" in refused.json()["error"]["message"]


def test_a_run_gives_name_number_format_and_blocks(chain_teacher, tmp_path) -> None:
    own = {"rollout": {"block_grid": "absolute", "block_size": 2}, "evaluation": {"order": "sequential"}}
    begin_run(chain_teacher, tmp_path / "mine", **own)
    found = ServeOptions(follow=str(tmp_path / "mine")).resolved()
    assert (found.name, found.dtype, found.block_size, found.block_grid) == ("mine", "float32", 2, "absolute")
    assert (found.checkpoint, found.strategy) == (str(tmp_path / "mine" / "student_init"), "sequential_dynamic")
    own = {"name": "other", "dtype": "bfloat16", "strategy": "low_confidence_dynamic"}
    given = ServeOptions(follow=str(tmp_path / "mine"), **own).resolved()
    assert (given.name, given.dtype, given.strategy) == ("other", "bfloat16", "low_confidence_dynamic")
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
