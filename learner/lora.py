"""What the learner publishes and saves of a student with LoRA adapters (`common/model/adapters.py`).

Of adapters on all tokens only the learner knows. It publishes `W + scaling B A` for every adapted layer under the
layer's plain name, so rollout actors, checksums and exports see an ordinary model. Adapters on noisy tokens alone
cannot be merged; they are published as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from opdlm.common.config.schema import LoraConfig
from opdlm.common.files import atomic_folder
from opdlm.common.model.adapters import ADAPTER, adapter_parameters, has_noisy_adapters, is_adapter, peft_config

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""Takes parameters and returns a context in which they are whole: `zero.gathered`, or `contextlib.nullcontext` for a
model that is not sharded."""


def merged_parameters(student: nn.Module, gather: Gather) -> Iterator[tuple[str, torch.Tensor]]:
    """(plain name, whole weight) of every parameter of the student, adapters merged in. A collective call.

    Adapters on noisy tokens alone cannot be merged: then these are the adapters, since nothing else is trained. A
    weight is valid until the next one is asked for.
    """
    if has_noisy_adapters(student):
        for name, parameter in adapter_parameters(student):
            with gather([parameter]):
                yield name, parameter.detach()
        return
    for name, parameter in student.named_parameters():
        if is_adapter(name):
            continue
        layer_name, separator, rest = name.partition(".base_layer.")
        layer: Any = student.get_submodule(layer_name) if separator else None
        parts = [parameter]
        if layer is not None and rest == "weight":
            parts += [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
        with gather(parts):
            whole = parameter.detach()
            if len(parts) > 1:
                _, down, up = (p.detach().float() for p in parts)
                whole = (whole.float() + layer.scaling[ADAPTER] * (up @ down)).to(whole.dtype)
            yield f"{layer_name}.{rest}" if separator else name, whole


def save_adapter(student: nn.Module, config: LoraConfig, base: str, folder: Path | None, gather: Gather) -> None:
    """Writes the adapters in peft's own layout (`PeftModel.from_pretrained(base_model, folder)`). A collective call.

    Args:
        base: name of the base model, for adapter_config.json.
        folder: where the rank that writes puts them; None on the other ranks.
    """
    tensors = {}
    for name, parameter in student.named_parameters():
        if is_adapter(name):
            with gather([parameter]):
                tensors[f"base_model.model.{name.replace(f'.{ADAPTER}', '')}"] = parameter.detach().cpu().clone()
    if folder is not None:
        made = peft_config(config)
        made.base_model_name_or_path = base
        made.inference_mode = True
        with atomic_folder(folder) as staging:
            made.save_pretrained(staging)
            save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
