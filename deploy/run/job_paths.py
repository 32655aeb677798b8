"""Where a run that was submitted as a Ray job may write.

`ray job submit --working-dir` has each node unpack a copy of the directory, and the job starts in the head's. The
copies are under paths of their own, see nothing of each other, and Ray deletes them when no job uses them any more.
"""

from __future__ import annotations

from pathlib import Path

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import ConfigError

_COPIES = ("runtime_resources", "working_dir_files")
"""Ray unpacks to SESSION/runtime_resources/working_dir_files/_ray_pkg_HASH (its WorkingDirPlugin)."""


def check_job_paths(config: OpdlmConfig) -> None:
    """Refuses a run whose results, models or kept rollouts are inside such a copy; one line for each setting.

    Raises:
        ConfigError: names the settings. A relative path in a job is the usual reason.
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
    """The path from the copy's root on; None for a path that is in none."""
    parts = path.resolve().parts
    for i in range(len(parts) - len(_COPIES)):
        if parts[i : i + len(_COPIES)] == _COPIES:
            return Path(*parts[i + len(_COPIES) + 1 :])
    return None
