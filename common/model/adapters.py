"""LoRA adapters in a student through peft: on all tokens, or on noisy tokens alone (METHOD.md section 11).

With adapters on noisy tokens alone the clean tokens are computed by the frozen base model: a student that learns to
draft is its own teacher. Which tokens of a forward are noisy is told before it (`mark_noisy`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opdlm.common.config.schema import LoraConfig
from opdlm.common.errors import OpdlmError

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
    torch.manual_seed(seed)
    try:
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


class NoisyAdapters:
    """Adapters, and an embedding of the mask token, that act on the noisy tokens of a forward only.

    Args:
        student: gets them, in place; only they stay trainable.
        mask_id: the mask token. Its embedding starts as the base model's.
    """

    def __init__(self, student: Any, config: LoraConfig, mask_id: int, seed: int) -> None:
        add_adapters(student, config, seed)
        student.noisy_adapters = self
        self._noisy: torch.Tensor | None = None
        self._mask_id = mask_id
        embedding = student.get_input_embeddings()
        embedding.register_parameter(MASK_EMBEDDING, nn.Parameter(embedding.weight[mask_id].detach().clone()))
        embedding.register_forward_hook(self._embed)
        for name, module in student.named_modules():
            if name.endswith(f"lora_B.{ADAPTER}"):
                module.register_forward_hook(self._gate)

    def mark(self, noisy: torch.Tensor | None) -> None:
        """Says which tokens of the next forwards are noisy, until it is called again (a checkpointed backward repeats
        its forward).

        Args:
            noisy: `[B, T]` bool; None: no token is.
        """
        self._noisy = noisy

    def _gate(self, module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """What an adapter adds: nothing to clean tokens."""
        if self._noisy is None:
            return torch.zeros_like(output)
        return torch.where(self._noisy[..., None], output, torch.zeros((), dtype=output.dtype, device=output.device))

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
