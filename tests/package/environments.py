"""Ways in which a user has the package: a checkout, an editable install and a wheel, each apart from this repository.

None of them uses pip to install: a new environment finds the dependencies of the current one, and pip would see that
`opdlm-ray` is installed there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests import REPOSITORY
from tests.package.source_files import ROOMS
from tests.patience import PATIENCE

ENTRY_POINT = (
    "from importlib.metadata import distribution;"
    "[command] = [e for e in distribution('opdlm-ray').entry_points if e.name == 'opdlm'];"
    "command.load()()"
)
"""Python code that does what the script `opdlm` does; pip would have written that script."""


@dataclass(frozen=True)
class Installation:
    """A Python that can import the package."""

    python: Path
    environment: dict[str, str]
    package: Path
    """The folder `opdlm` that it must import."""
    commands: tuple[tuple[str, ...], ...] = (("-m", "opdlm"), ("-P", "-m", "opdlm"))
    """The arguments of Python that start the command line, in every way that there is."""
    wheel: Path | None = None
    """The wheel that it was installed from."""

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs Python in a folder, to its end."""
        command = [str(self.python), *arguments]
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )


def checkout(folder: Path) -> Installation:
    """A copy of the working tree on PYTHONPATH."""
    tree = copy_tree(folder / "checkout")
    python = environment_without_opdlm(folder / "venv")
    return Installation(python, _environment() | {"PYTHONPATH": str(tree)}, tree / "opdlm")


def editable_install(folder: Path) -> Installation:
    """What `pip install --editable` does with a copy of the working tree: an import hook in site-packages."""
    tree = copy_tree(folder / "editable")
    code = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    _run([sys.executable, "-c", code, str(folder)], cwd=tree)
    python = environment_without_opdlm(folder / "venv")
    _unpack(folder, python)
    return Installation(python, _environment(), tree / "opdlm", _installed_commands())


def wheel_install(folder: Path) -> Installation:
    """A wheel of the working tree in an environment of its own."""
    wheel = build_wheel(folder)
    python = environment_without_opdlm(folder / "venv")
    package = _unpack(folder, python) / "opdlm"
    return Installation(python, _environment(), package, _installed_commands(), wheel)


def build_wheel(folder: Path) -> Path:
    """Builds a wheel of a copy of the working tree into a folder, offline; returns its path."""
    tree = copy_tree(folder / "tree")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    _run([sys.executable, "-m", "pip", "wheel", *options, str(tree)], cwd=folder)
    return next(folder.glob("*.whl"))


def copy_tree(folder: Path) -> Path:
    """Copies what a checkout has of the package, links as links."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("opdlm", *ROOMS):
        shutil.copytree(REPOSITORY / name, folder / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", "opdlm_command.py"):
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


def environment_without_opdlm(folder: Path) -> Path:
    """A new Python environment with the packages of the current one, except editable ones such as opdlm; its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    # Python reads no .pth files of a folder that is itself in a .pth file, so editable packages are not found.
    (_site_packages(python) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    found = subprocess.run([python, "-c", "import opdlm"], cwd=folder, env={}, capture_output=True, text=True)
    assert "No module named 'opdlm'" in found.stderr
    return python


def _site_packages(python: Path) -> Path:
    base = str(python.parents[1])
    return Path(sysconfig.get_paths(vars={"base": base, "platbase": base})["purelib"])


def _unpack(folder: Path, python: Path) -> Path:
    """Installs the wheel in a folder, as pip does apart from its script; returns where it is installed."""
    (wheel,) = folder.glob("*.whl")
    site_packages = _site_packages(python)
    zipfile.ZipFile(wheel).extractall(site_packages)
    return site_packages


def _installed_commands() -> tuple[tuple[str, ...], ...]:
    return (*Installation.commands, ("-c", ENTRY_POINT))


def _environment() -> dict[str, str]:
    """This process's variables, without those that change what Python imports or which cluster Ray joins."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout[-4000:]
