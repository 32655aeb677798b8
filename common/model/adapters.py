"""LoRA adapters in a student through peft: on all tokens, or on noisy tokens alone (METHOD.md section 11).

With adapters on noisy tokens alone the clean tokens are computed by the frozen base model: a student that learns to
draft is its own teacher. Which tokens of a forward are noisy is told before it (`hidden_states`, `load.py`).
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from opdlm.common.config.schema import LoraConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.files import read_json

ADAPTER = "default"
"""peft's name of the adapter in each layer."""
MASK_EMBEDDING = "mask_embedding"
"""Name of the trained embedding of the mask token, a parameter of the embedding."""


def add_adapters(student: nn.Module, config: LoraConfig, seed: int) -> None:
    """Puts adapters into the student, in place; only they stay trainable. Every rank draws the same ones.

    Raises:
        OpdlmError: peft is missing, or no layer has one of the names.
    """
    try:
        import peft
    except ImportError:
        raise OpdlmError("model.lora: needs the package peft; install opdlm-ray[lora]") from None
    try:
        with torch.random.fork_rng():  # whoever loads a student keeps the random numbers of its own
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(peft_config(config), student, adapter_name=ADAPTER)
    except ValueError as error:
        found = sorted({name.rsplit(".")[-1] for name, m in student.named_modules() if isinstance(m, nn.Linear)})
        raise OpdlmError(
            f"model.lora.target_modules: no layer of the student is called {config.target_modules}; its linear layers: "
            f"{', '.join(found)}"
        ) from error
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name is trained with adapters: a part of one, or the mask token's embedding."""
    return "lora_" in name or name.endswith(f".{MASK_EMBEDDING}")


def peft_config(config: LoraConfig) -> Any:
    """The settings as peft's."""
    import peft

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,  # the student that is trained is the one that decoded
        target_modules=list(config.target_modules),
        bias="none",
    )


NOISY_LORA = "noisy_lora"
"""Key of config.json: the settings of a student's adapters on noisy tokens, whose values are in `NOISY_FILE`."""
NOISY_FILE = "noisy_adapter/adapter_model.safetensors"


class NoisyAdapters:
    """Adapters, and an embedding of the mask token, that act on the noisy tokens of a forward only.

    Args:
        student: gets them, in place; only they stay trainable.
        mask_id: the mask token. Its embedding starts as the base model's.
    """

    def __init__(self, student: Any, config: LoraConfig, mask_id: int, seed: int) -> None:
        add_adapters(student, config, seed)
        student.noisy_adapters, self.config = self, config
        self._noisy: torch.Tensor | None = None
        self._mask_id = mask_id
        embedding = student.get_input_embeddings()
        embedding.register_parameter(MASK_EMBEDDING, nn.Parameter(embedding.weight[mask_id].detach().clone()))
        embedding.register_forward_hook(self._embed)
        for module in student.modules():
            if ADAPTER in getattr(module, "lora_A", ()):
                module.forward = functools.partial(self._linear, module)

    def mark(self, noisy: torch.Tensor | None) -> None:
        """Says which tokens of the next forwards are noisy, until it is called again (a checkpointed backward repeats
        its forward).

        Args:
            noisy: `[B, T]` bool; None: no token is.
        """
        self._noisy = noisy

    def _linear(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """A layer's output `[B, T, out]` for `[B, T, in]`: the base layer's, and what its adapter adds at noisy tokens.

        In place of peft's, which computes adapters of clean tokens too, and scales them where they are wide.
        """
        output = layer.base_layer(hidden)
        if self._noisy is None:
            return output
        narrow = layer.lora_A[ADAPTER](hidden) * layer.scaling[ADAPTER]  # as narrow as the rank
        narrow = torch.where(self._noisy[..., None], narrow, 0.0)
        return output + layer.lora_B[ADAPTER](narrow)

    def _embed(self, module: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """The embeddings `[B, T, D]` of ids `[B, T]`, with the trained one of the mask token where it is noisy."""
        if self._noisy is None:
            return output
        replaced = (arguments[0] == self._mask_id) & self._noisy
        return torch.where(replaced[..., None], module.mask_embedding, output)


def mark_noisy(student: Any, noisy: torch.Tensor | None) -> None:
    """Tells a student whose adapters act on noisy tokens alone which those of the next forwards are; else does nothing.

    Args:
        noisy: see `NoisyAdapters.mark`.
    """
    adapters: NoisyAdapters | None = getattr(student, "noisy_adapters", None)
    if adapters is not None:
        adapters.mark(noisy)


def has_noisy_adapters(student: Any) -> bool:
    """Whether the student has adapters that act on noisy tokens alone."""
    return getattr(student, "noisy_adapters", None) is not None


def adapter_parameters(student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of adapters and of the mask token's embedding."""
    return ((name, parameter) for name, parameter in student.named_parameters() if is_adapter(name))


def write_noisy_adapters(student: Any, folder: Path) -> None:
    """Writes adapters on noisy tokens beside the base model's weights in its folder, and names them in config.json."""
    file = folder / NOISY_FILE
    file.parent.mkdir(exist_ok=True)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in adapter_parameters(student)}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config[NOISY_LORA] = student.noisy_adapters.config.model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def noisy_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the adapters on noisy tokens in a model folder; nothing where config.json names none.

    Raises:
        OpdlmError: their file is missing or damaged.
    """
    if NOISY_LORA not in read_json(folder / "config.json"):
        return
    file = folder / NOISY_FILE
    if not file.is_file():
        raise OpdlmError(f"model folder {folder}: {NOISY_FILE} is missing, which config.json names ({NOISY_LORA})")
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise OpdlmError(f"{file} cannot be read: {' '.join(str(error).split())}") from None


def copy_noisy_adapters(source: Path, destination: Path) -> None:
    """Copies adapters on noisy tokens into another folder, whose config.json names them already."""
    (destination / NOISY_FILE).parent.mkdir()
    shutil.copyfile(source / NOISY_FILE, destination / NOISY_FILE)


def read_noisy_adapters(student: Any, folder: Path, config: Any) -> None:
    """Gives a loaded base model the adapters on noisy tokens of its folder, if it has any.

    Args:
        config: the folder's, as transformers reads it.

    Raises:
        OpdlmError: their file is missing or damaged, or has other tensors.
    """
    settings = getattr(config, NOISY_LORA, None)
    if settings is None:
        return
    NoisyAdapters(student, LoraConfig(**settings), config.mask_token_id, seed=0)
    file, tensors = folder / NOISY_FILE, dict(noisy_tensors(folder))
    own = dict(adapter_parameters(student))
    if own.keys() != tensors.keys() or any(own[name].shape != tensor.shape for name, tensor in tensors.items()):
        raise OpdlmError(f"{file}: its tensors are not those of the adapters that config.json names ({NOISY_LORA})")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
