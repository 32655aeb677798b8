"""The run files that come with the package, by name: `demo` is `deploy/demo.yaml`, wherever the package lies."""

from __future__ import annotations

from pathlib import Path

import opdlm.deploy
from opdlm.common.errors import ConfigError

_FOLDER = Path(opdlm.deploy.__file__).parent


def run_files() -> list[Path]:
    """The bundled run files, in alphabetical order of their names. (`serve.yaml` is for Ray Serve.)"""
    return sorted((file for file in _FOLDER.glob("*.yaml") if file.stem != "serve"), key=lambda file: file.stem)


def recipes() -> dict[str, str]:
    """The bundled run files in alphabetical order: name -> the first sentence of the comment on top of the file."""
    return {file.stem: _purpose(file) for file in run_files()}


def read_recipe(name: str) -> str:
    """The text of a bundled run file. `name`: with or without `.yaml`.

    Raises:
        ConfigError: there is none of that name.
    """
    known = recipes()
    stem = name.removesuffix(".yaml")
    if stem not in known:
        raise ConfigError(f"recipe: found {name!r}; known: {', '.join(known)}")
    return (_FOLDER / f"{stem}.yaml").read_text(encoding="utf-8")


def find_run_file(given: Path) -> Path:
    """The run file that a user means: the file itself; where it does not exist, the bundled one.

    A bundled file is meant by `NAME`, `NAME.yaml` and, as the documents write it, `deploy/NAME.yaml`.

    Raises:
        ConfigError: neither exists.
    """
    if given.is_file():
        return given
    bundled = _FOLDER / f"{given.name.removesuffix('.yaml')}.yaml"
    if given.parent in (Path(), Path("deploy")) and bundled.is_file():
        return bundled
    raise ConfigError(
        f"run file: {given} does not exist; give a YAML file, or the name of a bundled one such as deploy/demo.yaml "
        "(`opdlm recipes` lists them)"
    )


def _purpose(file: Path) -> str:
    comment: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].rstrip(".")
