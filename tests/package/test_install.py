"""`opdlm` is one import name, however it is installed and wherever it is started.

`pytest tests/package/test_install.py`

Every command starts in a folder that has packages `common`, `actors`, `deploy` and `learner` of its own, as a user's
project may: they raise an error when they are imported.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import opdlm
from opdlm.common.config import dump_config
from opdlm.deploy.observe.records import read_records
from tests.package.environments import (
    Installation,
    checkout,
    copy_tree,
    editable_install,
    wheel_install,
)
from tests.package.source_files import ROOMS, code_files, module_name
from tests.system.runs import run_config

IMPORTS = """
import sys
import opdlm
import opdlm.actors.pool
import opdlm.deploy.run.train
import opdlm.learner.group
print(opdlm.__file__)
print(opdlm.__version__)
print(sorted(name for name in sys.modules if name.partition(".")[0] in {"actors", "common", "deploy", "learner"}))
"""
ACTOR = """
import os
import ray

@ray.remote(num_cpus=1)
class Actor:
    def imported(self):
        import opdlm.actors.rollout.actor
        import opdlm.learner.worker
        return os.getcwd(), opdlm.__file__

if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False)
    print(*ray.get(Actor.remote().imported.remote()), sep="\\n")
"""


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A working directory with packages that have the names of the four rooms."""
    folder = tmp_path / "project"
    for room in ROOMS:
        (folder / room).mkdir(parents=True)
        for name in ("__init__", "errors"):
            (folder / room / f"{name}.py").write_text(f"raise RuntimeError('{room} of the working directory')\n")
    return folder


Install = Callable[[Callable[[Path], Installation]], Installation]


@pytest.fixture(scope="module")
def install(tmp_path_factory) -> Install:
    """Makes an installation, each kind once. Skips the test where the build backend is missing."""
    made: dict[Callable[[Path], Installation], Installation] = {}

    def once(how: Callable[[Path], Installation]) -> Installation:
        if how is not checkout:
            require_build_backend()
        if how not in made:
            made[how] = how(tmp_path_factory.mktemp(how.__name__))
        return made[how]

    return once


def require_build_backend() -> None:
    """Skips the test where setuptools is missing, or older than pyproject.toml asks for."""
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel, which needs setuptools>=77")


HOW = pytest.mark.parametrize("how", [checkout, editable_install, wheel_install], ids=lambda how: how.__name__)


@HOW
def test_the_command_line_starts(install, how, hostile) -> None:
    installed = install(how)
    for command in installed.commands:
        done = installed.run(*command, "--help", cwd=hostile)
        assert done.returncode == 0, (command, done.stderr)
        assert "pretrain" in done.stdout


@HOW
def test_every_room_is_imported_from_the_installation(install, how, hostile) -> None:
    installed = install(how)
    (hostile / "script.py").write_text(IMPORTS)
    done = installed.run("script.py", cwd=hostile)
    assert done.returncode == 0, done.stderr
    expected = [str(installed.package / "__init__.py"), opdlm.__version__, "[]"]
    assert done.stdout.splitlines() == expected


def test_the_hostile_packages_are_in_the_way(install, hostile) -> None:
    """Without the prefix `opdlm`, the working directory's package is imported: the tests here can fail."""
    done = install(checkout).run("-c", "import common.errors", cwd=hostile)
    assert "RuntimeError: common of the working directory" in done.stderr


def test_the_wheel_has_every_module_and_every_data_file(install, tmp_path) -> None:
    wheel = install(wheel_install).wheel
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in names if not name.startswith("opdlm_ray-")}
    tree = copy_tree(tmp_path / "expected")
    rooms = {f"opdlm/{f.relative_to(tree)}" for room in ROOMS for f in (tree / room).rglob("*") if f.is_file()}
    assert ours == rooms | {f"opdlm/{f.name}" for f in (tree / "opdlm").glob("*.py")} | {"opdlm_command.py"}
    modules = {module_name(file) for file in code_files()}
    assert len([name for name in ours if name.endswith(".py")]) == len(modules) + 1
    data = {
        "opdlm/deploy/demo.yaml",
        "opdlm/deploy/cluster_files/slurm.sh",
        "opdlm/deploy/grafana/opdlm.json",
        "opdlm/deploy/tools/trace/templates/trace.html",
        "opdlm/deploy/pages/templates/look.css",
        "opdlm/deploy/serve/templates/live.html",
        "opdlm/deploy/tools/trace/templates/trace.js",
        "opdlm/common/export/templates/block_causal.py",
    }
    assert data <= ours
    assert "[console_scripts]\nopdlm = opdlm_command:main" in _text(wheel, "entry_points.txt")
    assert f"\nVersion: {opdlm.__version__}\n" in _text(wheel, "METADATA")


def _text(wheel: Path, name: str) -> str:
    """The text of a file of a wheel's metadata."""
    return zipfile.ZipFile(wheel).read(f"opdlm_ray-{opdlm.__version__}.dist-info/{name}").decode()


@pytest.mark.ray
@pytest.mark.slow
def test_an_actor_imports_the_checkout(install, hostile) -> None:
    """Ray puts the folder of the driver's script on the path of its workers, which start in the working directory."""
    installed = install(checkout)
    (hostile / "script.py").write_text(ACTOR)
    done = installed.run("script.py", cwd=hostile)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [str(hostile), str(installed.package / "__init__.py")]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_of_the_wheel_ends_well(install, hostile, chain_teacher) -> None:
    """`opdlm train`, one round: driver, actors, the learner's rank and the tasks that load nothing but the wheel."""
    config = run_config(
        chain_teacher,
        hostile / "run",
        run={"rounds": 1},
        learner={"workers": 1},
        evaluation={"final_problems": 0},
        resources={"local_dashboard": False},
    )
    (hostile / "run.yaml").write_text(dump_config(config))
    done = install(wheel_install).run("-m", "opdlm", "train", "run.yaml", cwd=hostile)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert [r["round"] for r in read_records(hostile / "run") if r["kind"] == "round"] == [1]
    assert (hostile / "run" / "student" / "model.safetensors").exists()
