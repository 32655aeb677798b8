"""Paths of a run, as its actors must see them.

Actors have other working directories than the driver, so paths become absolute. In a run that `ray job submit
--working-dir` started, relative paths point into a copy of that directory: every node unpacks one of its own, sees
nothing of the others, and Ray deletes them when no job uses them any more. Nothing may be kept there.
"""

from __future__ import annotations

import os
from pathlib import Path

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import ConfigError

_COPIES = ("runtime_resources", "working_dir_files")
"""Ray unpacks to SESSION/runtime_resources/working_dir_files/_ray_pkg_HASH (its WorkingDirPlugin)."""


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
    paths = {
        "run.dir": config.run.dir,
        "run.replay": config.run.replay,
        "model.teacher": config.model.teacher,
        "model.student": config.model.student,
        "offline.cache": config.offline.cache,
    }
    lines = [
        f"{name}: {inside} is in this job's copy of the working directory, which no other node sees and which Ray "
        f"deletes after the job; give an absolute path that every node sees, e.g. {name}=/shared/{inside}"
        for name, path in paths.items()
        if path is not None and (inside := inside_job_copy(Path(path))) is not None
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def inside_job_copy(path: Path) -> Path | None:
    """The path relative to the job's copy that it lies in; None for a path outside of such a copy."""
    parts = Path(os.path.realpath(path)).parts
    for i in range(len(parts) - len(_COPIES)):
        if parts[i : i + len(_COPIES)] == _COPIES:
            return Path(*parts[i + len(_COPIES) + 1 :])
    return None
