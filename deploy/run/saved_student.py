"""The student of a run as its checkpoints hold it: for whoever wants to use it while the run goes on.

A checkpoint has the trained parameters in float32. Its student is the run's start student with them in their place, in
the run's number format, adapters on all tokens merged: the weights that the run published, and writes to RUN/student.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opdlm.common.checkpoint import WEIGHTS, list_checkpoints, read_weights, weights_mark
from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.common.errors import OpdlmError
from opdlm.common.model.adapters import add_adapters, has_noisy_adapters, is_adapter
from opdlm.common.model.load import load_model
from opdlm.common.model.shards import model_fingerprint, require_finite
from opdlm.deploy.run.directory import held_config
from opdlm.deploy.run.start_models import start_folder
from opdlm.learner.lora import merged_parameters


@dataclass(frozen=True, slots=True)
class Found:
    """Weights of a run: a checkpoint, or a model folder."""

    folder: Path
    mark: str
    """Differs where the folder has come to hold other weights."""


@dataclass(frozen=True, slots=True)
class SavedRun:
    """A run directory that another process may be writing to. Nothing here writes."""

    folder: Path
    config: OpdlmConfig
    start: Path
    """Model folder of the student that the run began with."""

    def newest(self) -> Found:
        """The newest weights: those of the last checkpoint, else the finished student, else the start student.

        A checkpoint appears whole, by a rename, so none is found that is half written. It may be gone by the time that
        it is read, for a run removes old ones.

        Raises:
            OpdlmError: there is no checkpoint, and the finished or the start student cannot be read.
        """
        for checkpoint in reversed(list_checkpoints(self.folder / "checkpoints")):
            if (mark := weights_mark(checkpoint)) is not None:
                return Found(checkpoint, mark)
        folder = student if (student := self.folder / "student").is_dir() else self.start
        return Found(folder, model_fingerprint(folder))


def open_saved_run(folder: Path) -> SavedRun:
    """Opens a run directory.

    Raises:
        OpdlmError: it holds no run, or one that has no student yet.
    """
    folder = folder.resolve()
    if not (folder / "config.yaml").is_file():
        raise OpdlmError(f"{folder} holds no run (no config.yaml); start the run first, or give its run.dir")
    config = config_from_dict(held_config(folder))
    start = start_folder(config, folder)
    if not (start / "config.json").is_file():
        raise OpdlmError(f"{folder} has no student yet ({start} is missing); the run makes it when it starts")
    return SavedRun(folder, config, start)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, and not a model folder."""
    return (folder / WEIGHTS).is_file() and (folder / "state.json").is_file()


def put_checkpoint(student: Any, config: OpdlmConfig, checkpoint: Path) -> None:
    """Puts a checkpoint's trained parameters into the run's start student, in place; they may be adapters.

    Args:
        student: the start student as `load_model` gives it. One that is trained with adapters on all tokens gets them.

    Raises:
        OpdlmError: the checkpoint cannot be read, or is not of this student.
    """
    if (lora := config.model.lora) is not None and not has_noisy_adapters(student):
        add_adapters(student, lora, config.run.seed)
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, values in read_weights(checkpoint):
            if name not in trained or trained[name].shape != values.shape:
                raise OpdlmError(f"{checkpoint}: its {name} {tuple(values.shape)} is no trained parameter of the run")
            require_finite(values, name, checkpoint)
            trained.pop(name).copy_(values)
    if trained:
        raise OpdlmError(f"{checkpoint}: it lacks {sorted(trained)[0]}, which the run trains")


def saved_student(checkpoint: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The student of a checkpoint: its start student's folder, and its state dict in the run's number format.

    Args:
        checkpoint: `RUN/checkpoints/round-NNNNNN`.

    Raises:
        OpdlmError: as `open_saved_run` and `put_checkpoint`.
    """
    run = open_saved_run(checkpoint.resolve().parent.parent)
    student = load_model(run.start, run.config.model.dtype)
    put_checkpoint(student, run.config, checkpoint)
    if run.config.model.lora is None or has_noisy_adapters(student):
        return run.start, student.state_dict()
    plain = {n.replace(".base_layer.", "."): v for n, v in student.state_dict().items() if not is_adapter(n)}
    return run.start, plain | dict(merged_parameters(student, lambda parameters: nullcontext()))
