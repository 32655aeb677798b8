"""Paths of a run, as its actors must see them.

Actors have other working directories than the driver, so paths become absolute. In a run that `ray job submit
--working-dir` started, relative paths point into a copy of that directory: every node unpacks one of its own, sees
nothing of the others, and Ray deletes them when no job uses them any more. Nothing may be kept there.

The driver alone asks the Hugging Face hub: actors get the folder in its cache, which every node must see.
"""

from __future__ import annotations

import os
from pathlib import Path

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.files import read_yaml
from opdlm.common.model.hub import hub_id, model_folder

_COPIES = ("runtime_resources", "working_dir_files")
"""Ray unpacks to SESSION/runtime_resources/working_dir_files/_ray_pkg_HASH (its WorkingDirPlugin)."""


def local_models(config: OpdlmConfig) -> OpdlmConfig:
    """The config with a folder for each model that is named by its hub id, downloaded where it is not in the cache.

    A run that has begun keeps the files that it started with, whatever the hub has by now: where config.yaml of the run
    directory names a folder in the cache of the same hub id, that one is taken.

    Raises:
        OpdlmError: a model is no folder and cannot be downloaded, or is a GGUF file. In a job, where a
            relative path looks like a hub id that does not exist, what `check_job_paths` says comes first.
    """
    file = Path(config.run.dir, "config.yaml")
    held = read_yaml(file).get("model") if os.path.isfile(file) else None
    before = held if isinstance(held, dict) else {}
    found: dict[str, str | None] = {}
    for name in ("teacher", "student"):
        given, earlier = getattr(config.model, name), before.get(name)
        if given is None:
            found[name] = None
        elif isinstance(earlier, str) and hub_id(earlier) == given and os.path.isdir(earlier):
            found[name] = earlier
        else:
            try:
                found[name] = str(model_folder(given, f"model.{name}"))
            except OpdlmError as error:
                raise OpdlmError("\n".join([*_lines_of_job_copies(config), str(error)])) from None
    return config.model_copy(update={"model": config.model.model_copy(update=found)})


def absolute_paths(config: OpdlmConfig) -> OpdlmConfig:
    """The config with absolute paths of the teacher, the student, the run directory, kept rollouts and responses."""

    def absolute(path: str | None) -> str | None:
        return os.path.realpath(path) if path else path  # Path.resolve() raises where a link leads to itself

    model, run, offline = config.model, config.run, config.offline
    return config.model_copy(
        update={
            "model": model.model_copy(update={"teacher": absolute(model.teacher), "student": absolute(model.student)}),
            "run": run.model_copy(update={"dir": absolute(run.dir), "replay": absolute(run.replay)}),
            "offline": offline.model_copy(update={"cache": absolute(offline.cache)}),
        }
    )


def check_job_paths(config: OpdlmConfig) -> None:
    """Refuses a run whose results, models or kept rollouts lie in a job's copy of the working directory.

    Raises:
        ConfigError: one line per setting. A relative path in a job is the usual reason.
    """
    if lines := _lines_of_job_copies(config):
        raise ConfigError("\n".join(lines))


def _lines_of_job_copies(config: OpdlmConfig) -> list[str]:
    paths = {
        "run.dir": config.run.dir,
        "run.replay": config.run.replay,
        "model.teacher": config.model.teacher,
        "model.student": config.model.student,
        "offline.cache": config.offline.cache,
    }
    return [
        f"{name}: {inside} is in this job's copy of the working directory, which no other node sees and which Ray "
        f"deletes after the job; give an absolute path that every node sees, e.g. {name}=/shared/{inside}"
        for name, path in paths.items()
        if path is not None and (inside := inside_job_copy(Path(path))) is not None
    ]


def inside_job_copy(path: Path) -> Path | None:
    """The path relative to the job's copy that it lies in; None for a path outside of such a copy."""
    parts = Path(os.path.realpath(path)).parts
    for i in range(len(parts) - len(_COPIES)):
        if parts[i : i + len(_COPIES)] == _COPIES:
            return Path(*parts[i + len(_COPIES) + 1 :])
    return None
