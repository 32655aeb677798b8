"""The records of a run in Weights & Biases (`run.wandb_project`, extra `wandb`), under TensorBoard's names."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import OpdlmError, first_line
from opdlm.deploy.observe.writers import figures, path_of

_STEP = "optimizer_step"


class WandbWriter:
    """A wandb run named after the run directory; a resumed run goes on in the same one (its id is in `RUN/wandb_id`).

    Raises:
        OpdlmError: wandb cannot start (nobody is logged in, no network).
    """

    def __init__(self, config: OpdlmConfig) -> None:
        wandb: Any = importlib.import_module("wandb")
        run_dir = Path(config.run.dir)
        file = run_dir / "wandb_id"
        try:
            self._run = wandb.init(
                project=config.run.wandb_project,
                name=run_dir.name,
                id=file.read_text() if file.exists() else None,
                resume="allow",
                dir=str(run_dir),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off"),  # the live view owns the terminal
            )
        except wandb.Error as error:
            reason = first_line(error)
            raise OpdlmError(
                f"run.wandb_project: wandb does not start: {reason} (WANDB_MODE=offline needs no login and no network)"
            ) from error
        file.write_text(self._run.id)
        self._run.define_metric("*", step_metric=_STEP)

    def write(self, record: dict[str, Any]) -> None:
        """See `Sink`."""
        shown = {path_of(record, figure): value for figure, value in figures(record)}
        self._run.log({_STEP: record["step"], **shown})

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()
