"""The run directory: what a run writes there, and whether a run may start or resume there.

RUN/config.yaml  metrics.jsonl  timeline.json  tensorboard/  checkpoints/  student_init/  student/  adapter/
    rollouts/  offline_responses.parquet  report.json  report.png
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from opdlm.common.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints
from opdlm.common.config import OpdlmConfig, config_from_dict, dump_config
from opdlm.common.errors import ConfigError
from opdlm.common.files import read_yaml, write_text

_MAY_CHANGE = (
    "resources",
    "checkpoint",
    "evaluation",
    "rollout.actors",
    "rollout.cpus_per_actor",
    "rollout.gpus_per_actor",
    "rollout.placement",
    "rollout.prompts_per_call",
    "rollout.weight_transport",
    "rollout.cuda_graphs",
    "teacher.actors",
    "teacher.cpus_per_actor",
    "teacher.gpus_per_actor",
    "teacher.placement",
    "learner.workers",
    "learner.cpus_per_worker",
    "learner.gpus_per_worker",
    "learner.placement",
    "learner.micro_batch_rows",
    "learner.zero",
    "learner.max_failures",
    "run.dir",
    "run.dump_rollouts",
    "run.wandb_project",
    "offline.cache",
)
"""Settings that may differ when a run is resumed: they change how work is done and observed, not what is learned."""


def open_run(config: OpdlmConfig, resume: bool, data_digest: str) -> Checkpoint | None:
    """Makes or reopens the run directory; returns the checkpoint from which the run goes on, or None.

    Args:
        data_digest: fingerprint of the prompts; a run is not resumed on other prompts.

    Raises:
        ConfigError: the directory holds a run and `resume` is off, its run has another config or other prompts, or
            there is nothing to resume. In each case nothing is changed.
    """
    root = Path(config.run.dir)
    file = root / "config.yaml"
    if not resume:
        if holds_run(root):
            held = f"{len(list_checkpoints(root / 'checkpoints'))} checkpoints"
            raise ConfigError(
                f"run.dir: {root} already holds a run ({held}); continue it with --resume, or give another run.dir"
            )
        root.mkdir(parents=True, exist_ok=True)
        write_text(file, dump_config(config))
        return None
    if not file.exists():
        raise ConfigError(f"run.dir: --resume, but {root} holds no run; start it without --resume")
    check_same_config(held_config(root), config.model_dump(mode="json"), root)
    checkpoint = latest_checkpoint(root / "checkpoints")
    if checkpoint and checkpoint.state["data_digest"] != data_digest:
        raise ConfigError(
            f"data: the prompts are not those that {root} was started with (fingerprint {data_digest}, was "
            f"{checkpoint.state['data_digest']}); restore the data, or start in another run.dir"
        )
    truncate_metrics(root / "metrics.jsonl", checkpoint.rounds if checkpoint else 0)
    return checkpoint


def holds_run(root: Path) -> bool:
    """Whether a run was started in a directory."""
    return (root / "checkpoints").exists() or (root / "metrics.jsonl").exists()


def held_config(root: Path) -> dict[str, Any]:
    """The config of the run in a directory; a setting that is missing in its config.yaml has its default."""
    return config_from_dict(read_yaml(root / "config.yaml")).model_dump(mode="json")


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


HISTORY = frozenset({"failure", "actor_death", "learner_restart", "queue_death", "failed_save", "scale"})
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
