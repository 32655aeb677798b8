"""The models that a run starts from: RUN/models.json says which they are, RUN/student_init is the student made of them.

A start that failed leaves a student behind. The next start in the same directory uses it only if it was made of the
same teacher in the same way. A run that has begun is not resumed with other models.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opdlm.common.checkpoint import list_checkpoints
from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.files import read_json, write_json
from opdlm.common.model.adapters import NoisyAdapters, write_noisy_adapters
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.load import load_model
from opdlm.common.model.mask_token import MASK_TOKEN
from opdlm.common.model.shards import model_fingerprint

_FILE = "models.json"
_FORMAT = 1
"""Raise it when conversion makes another student of the same teacher, or the fingerprints change."""


def check_models(config: OpdlmConfig) -> None:
    """Checks that a run that has begun goes on with the models that it started with.

    Raises:
        ConfigError: the files of the teacher or the student have changed.
    """
    root = Path(config.run.dir)
    held = _held(root)
    if held is None or held.get("format") != _FORMAT:  # a run of another version
        return
    now = _models(config)
    for name in ("teacher", "student"):
        if held.get(name) != now[name]:
            raise ConfigError(
                f"model.{name}: {getattr(config.model, name)} has changed since {root} was started with it "
                f"(fingerprint {now[name]}, was {held.get(name)}); restore it, or start in another run.dir"
            )


def prepare_student(config: OpdlmConfig) -> str:
    """The folder of the student's first weights; without a given student, the teacher is converted into it.

    Call it while holding the lock of the run directory. A student that an earlier start made of another teacher, or in
    another way, is made anew, unless the run has checkpoints, which belong to it.
    """
    root = Path(config.run.dir).resolve()
    models, folder = _models(config), start_folder(config, root)
    start, lora = config.model.student or config.model.teacher, config.model.lora
    is_stale = not folder.exists() or (_held(root) != models and not list_checkpoints(root / "checkpoints"))
    if _is_made(config) and is_stale:
        (root / _FILE).unlink(missing_ok=True)  # first: a folder without it counts as made of something else
        for old in (folder, *root.glob(".student_init.*")):  # also what a process that was killed has left half made
            shutil.rmtree(old, ignore_errors=True)
        grid = config.rollout.block_size, config.rollout.block_grid
        form = read_facts(start).form if config.model.student else config.model.converted_form
        how = *grid, config.model.mask_token, form.logit_shift, form.context, config.decoding_order
        convert_checkpoint(start, folder, *how)
        if lora is not None and _gets_adapters(config):
            student = load_model(folder, config.model.dtype)
            NoisyAdapters(student, lora, require_mask(read_facts(folder)), config.run.seed)
            write_noisy_adapters(student, folder)
    write_json(root / _FILE, models)
    return str(folder)


def start_folder(config: OpdlmConfig, run_dir: Path) -> Path:
    """Where the student's first weights are, or will be: a folder of the run directory, or the given student's own."""
    return run_dir / "student_init" if _is_made(config) else Path(str(config.model.student)).resolve()


def _is_made(config: OpdlmConfig) -> bool:
    """Whether the run makes its start student, and does not take a given one as it is."""
    return not config.model.student or _gets_adapters(config)


def _gets_adapters(config: OpdlmConfig) -> bool:
    """Whether the run gives its student adapters on noisy tokens, because it has none yet."""
    start, lora = config.model.student or config.model.teacher, config.model.lora
    return lora is not None and lora.tokens == "noisy" and not read_facts(start).has_noisy_adapters


def _models(config: OpdlmConfig) -> dict[str, Any]:
    model, rollout = config.model, config.rollout
    return {
        "format": _FORMAT,
        "teacher": model_fingerprint(model.teacher),
        "student": model_fingerprint(model.student) if model.student else None,
        "block_size": rollout.block_size,
        "block_grid": rollout.block_grid,
        "mask_token": model.mask_token or MASK_TOKEN,
        **({"lora": model.lora.model_dump(mode="json")} if model.lora and model.lora.tokens == "noisy" else {}),
        "decoding_order": config.decoding_order,
        **asdict(model.converted_form),
    }


def _held(root: Path) -> dict[str, Any] | None:
    """What models.json says; None where it is missing (a run of an earlier version) or damaged."""
    try:
        return read_json(root / _FILE)
    except (OSError, OpdlmError):
        return None
