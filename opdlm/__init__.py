"""opdlm turns autoregressive language models into block-diffusion language models, by on-policy distillation.

    import opdlm

    print(opdlm.load("runs/demo/student").generate(["47+8-3="], threshold=0.9)[0].text)

`docs/python-api.md` has examples. The packages `opdlm.common`, `opdlm.actors`, `opdlm.learner` and `opdlm.deploy` are
links to the folders of these names in the repository. Importing `opdlm` loads neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdlm.api import convert, evaluate, export, load, train
    from opdlm.common.config import load_config
    from opdlm.common.errors import OpdlmError
    from opdlm.deploy.evaluate.generation import Generation, Model

__version__ = "0.1.0"

_MODULES = {
    "Generation": "opdlm.deploy.evaluate.generation",
    "Model": "opdlm.deploy.evaluate.generation",
    "OpdlmError": "opdlm.common.errors",
    "convert": "opdlm.api",
    "evaluate": "opdlm.api",
    "export": "opdlm.api",
    "load": "opdlm.api",
    "load_config": "opdlm.common.config",
    "train": "opdlm.api",
}
"""Where each public name is defined; its module is imported when the name is first used."""

__all__ = [
    "Generation",
    "Model",
    "OpdlmError",
    "__version__",
    "convert",
    "evaluate",
    "export",
    "load",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'opdlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
