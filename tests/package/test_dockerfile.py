"""The Dockerfile, as far as it can be checked without Docker. `pytest tests/package/test_dockerfile.py`"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import opdlm
from tests import REPOSITORY
from tests.package.source_files import ROOMS

TEXT = (REPOSITORY / "Dockerfile").read_text()
LINES = re.sub(r"\\\n", "", TEXT).splitlines()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", ["kuberay-raycluster.yaml", "kuberay-rayjob.yaml"])
def test_it_builds_the_image_that_the_kuberay_files_start(name) -> None:
    spec = yaml.safe_load((REPOSITORY / "deploy" / "cluster_files" / name).read_text())["spec"]
    spec = spec.get("rayClusterSpec", spec)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    (image,) = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert image.endswith(f"/opdlm-ray:{opdlm.__version__}")
    assert f"docker build --tag {image} ." in TEXT
    versions = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"ray=={spec['rayVersion']}" in versions, "the image has the versions of constraints.txt"


def test_the_build_gets_every_file_that_it_needs() -> None:
    copied = [name for line in LINES if line.startswith("COPY") for name in line.split()[1:-1]]
    assert copied == ["pyproject.toml", "constraints.txt", "."]
    left_out = {line.rstrip("/") for line in (REPOSITORY / ".dockerignore").read_text().splitlines()}
    needed = {*ROOMS, "opdlm", "opdlm_command.py", PROJECT["readme"], *PROJECT["license-files"], *copied}
    assert all((REPOSITORY / name).exists() for name in needed)
    assert not left_out & needed


def test_its_extras_and_its_python_are_those_of_the_package() -> None:
    (extras,) = (line.removeprefix("ARG EXTRAS=").split(",") for line in LINES if line.startswith("ARG EXTRAS="))
    assert "serve" in extras
    assert set(extras) <= PROJECT["optional-dependencies"].keys()
    (base,) = (line.removeprefix("FROM python:") for line in LINES if line.startswith("FROM "))
    assert base.startswith(PROJECT["requires-python"].removeprefix(">="))


def test_every_step_is_a_shell_command() -> None:
    steps = [line.removeprefix("RUN ") for line in LINES if line.startswith("RUN ")]
    assert len(steps) == 4
    for step in steps:
        subprocess.run(["sh", "-n", "-c", step], check=True)


def test_the_dependencies_are_those_of_the_package() -> None:
    """Runs the part of a step that lists them."""
    (step,) = (line for line in LINES if "requirements.txt" in line)
    command, _, _ = step.removeprefix("RUN ").partition(" > /src/requirements.txt")
    command = command.replace("/src", str(REPOSITORY)).replace("python -c", f"{sys.executable} -c")
    done = subprocess.run(["sh", "-c", f"EXTRAS=serve,lora; {command}"], check=True, capture_output=True, text=True)
    extras = PROJECT["optional-dependencies"]
    assert done.stdout.splitlines() == [*PROJECT["dependencies"], *extras["serve"], *extras["lora"]]
