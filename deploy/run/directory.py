"""The run directory: what a run writes there, and whether a run may start or resume there.

RUN/config.yaml  models.json  metrics.jsonl  timeline.json  tensorboard/  checkpoints/  student_init/  student/
    best/  adapter/  rollouts/  offline_responses.parquet  report.json  report.png  lock.json (a process works there)
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from opdlm.common.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints
from opdlm.common.config import OpdlmConfig, config_from_dict, dump_config
from opdlm.common.errors import ConfigError
from opdlm.common.files import check_file, check_folder, read_yaml, write_text
from opdlm.deploy.run.lock import check_unlocked
from opdlm.deploy.run.start_models import check_models

_MAY_CHANGE = (
    "resources",
    "checkpoint",
    "evaluation",
    "rollout.actors",
    "rollout.cpus_per_actor",
    "rollout.gpus_per_actor",
    "rollout.placement",
    "rollout.weight_transport",
    "rollout.cuda_graphs",
    "rollout.cache_tokens",
    "teacher.actors",
    "teacher.cpus_per_actor",
    "teacher.gpus_per_actor",
    "teacher.placement",
    "reward.actors",
    "reward.cpus_per_actor",
    "reward.reference_actors",
    "reward.time_limit_seconds",
    "learner.workers",
    "learner.cpus_per_worker",
    "learner.gpus_per_worker",
    "learner.placement",
    "learner.micro_batch_tokens",
    "learner.zero",
    "learner.max_failures",
    "run.dir",
    "run.dump_rollouts",
    "run.max_minutes",
    "run.wandb_project",
    "offline.cache",
)
"""Settings that may differ when a run is resumed: they change how work is done and observed, not what is learned."""


def check_run(config: OpdlmConfig, resume: bool) -> None:
    """Checks what can be known of the run directory before models and data are read. Changes nothing.

    Raises:
        OpdlmError: the directory holds a run and `resume` is off, its run has another config, there is nothing to
            resume, another process works there, or it cannot be written.
    """
    root = Path(config.run.dir)
    if not resume or os.path.exists(root / "config.yaml"):
        check_folder(root, "run.dir")
        check_unlocked(root)
    _check_cache(config)
    _check_held_run(config, root, resume)


def _check_cache(config: OpdlmConfig) -> None:
    """Where the teacher has yet to write responses, they must find room in their cache. A full cache is only read."""
    offline = config.offline
    writes = config.objective.kind in ("cft", "off_policy_kd") and offline.responses == "teacher"
    if writes and offline.cache is not None and not os.path.exists(offline.cache):
        check_file(Path(offline.cache), "offline.cache")


def _check_held_run(config: OpdlmConfig, root: Path, resume: bool) -> None:
    if resume:
        if not os.path.exists(root / "config.yaml"):
            raise ConfigError(f"run.dir: --resume, but {root} holds no run; start it without --resume")
        check_same_config(held_config(root), config.model_dump(mode="json"), root)
    elif holds_run(root):
        held = f"{len(list_checkpoints(root / 'checkpoints'))} checkpoints"
        raise ConfigError(
            f"run.dir: {root} already holds a run ({held}); continue it with --resume, or give another run.dir"
        )


def find_checkpoint(config: OpdlmConfig, resume: bool, data_digest: str) -> Checkpoint | None:
    """The checkpoint from which a run goes on: the newest whole one; None for a new run. Changes nothing.

    Call it while holding the lock of the run directory.

    Args:
        data_digest: fingerprint of the prompts; a run is not resumed on other prompts.

    Raises:
        OpdlmError: as `check_run`, or the run has other prompts or models, or no checkpoint is whole.
    """
    root = Path(config.run.dir)
    _check_held_run(config, root, resume)  # again: another process may have worked here since `check_run`
    if not resume:
        return None
    if holds_run(root):  # a start that failed has nothing that depends on the models
        check_models(config)
    checkpoint = latest_checkpoint(root / "checkpoints")
    if checkpoint and checkpoint.state["data_digest"] != data_digest:
        raise ConfigError(
            f"data: the prompts are not those that {root} was started with (fingerprint {data_digest}, was "
            f"{checkpoint.state['data_digest']}); restore the data, or start in another run.dir"
        )
    return checkpoint


def open_run(config: OpdlmConfig, resume: bool, checkpoint: Checkpoint | None) -> None:
    """Makes the run directory, or opens it again at a checkpoint: the records of later rounds are removed."""
    root = Path(config.run.dir)
    if resume:
        truncate_metrics(root / "metrics.jsonl", checkpoint.rounds if checkpoint else 0)
    else:
        root.mkdir(parents=True, exist_ok=True)
        write_text(root / "config.yaml", dump_config(config))


def holds_run(root: Path) -> bool:
    """Whether a run was started in a directory."""
    return any(os.path.exists(root / name) for name in ("checkpoints", "metrics.jsonl", "student", "adapter"))


def held_config(root: Path) -> dict[str, Any]:
    """The config of the run in a directory; a setting that is missing in its config.yaml has its default.

    Raises:
        ConfigError: the file is not a run file of this version.
    """
    file = root / "config.yaml"
    try:
        return config_from_dict(read_yaml(file)).model_dump(mode="json")
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def check_same_config(held: dict[str, Any], given: dict[str, Any], root: Path) -> None:
    """Raises `ConfigError` that names the settings in which a run and its continuation differ."""
    before, now = flatten(held), flatten(given)
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in _MAY_CHANGE)
    ]
    if differing:
        shown = ", ".join(f"{key} (was {before.get(key)!r}, now {now.get(key)!r})" for key in differing[:5])
        raise ConfigError(
            f"run.dir: {root} holds a run of another config: {shown}; resume with {root}/config.yaml, "
            "or start in another run.dir"
        )


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{a: {b: 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def config_digest(config: OpdlmConfig) -> str:
    """Short fingerprint of the resolved config, kept in each checkpoint."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]


HISTORY = frozenset(
    {
        "failure",
        "actor_death",
        "learner_restart",
        "queue_death",
        "damaged_checkpoint",
        "failed_save",
        "scale",
        "early_stop",
    }
)
"""Kinds of records about what happened to the run, not what it learned. They stay when rounds are trained again."""


def truncate_metrics(file: Path, rounds: int, kept_kinds: frozenset[str] = HISTORY) -> None:
    """Removes the records of rounds that will be trained again, and a line that a crash or a full disk cut short."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # only the last line can be cut short
        # `round` is the index of the round in a record of a step, and the number of trained rounds in all others.
        ends = rounds + (record["kind"] not in ("step", "skipped_step"))
        if record["round"] < ends or record["kind"] in kept_kinds:
            kept.append(line + "\n")
    write_text(file, "".join(kept))
