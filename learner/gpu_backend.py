"""Ray Train's setup of a worker group on GPUs, for nodes whose torch can use none: `train_loop` then says so.

NCCL would fail first, with an error that names no setting, and Ray Train would start the group again and again. Imports
torch and Ray Train; `group.py` imports it where ranks have GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class GpuConfig(TorchConfig):
    """NCCL on a group whose every rank can use a GPU, gloo otherwise."""

    backend: str | None = "nccl"

    @property
    def backend_cls(self) -> Any:
        """See `BackendConfig`."""
        return _GpuBackend


class _GpuBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        usable = worker_group.execute(torch.cuda.is_available)
        super().on_start(worker_group, backend_config if all(usable) else replace(backend_config, backend="gloo"))
