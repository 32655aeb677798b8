"""A lossless student: a causal model, and adapters that act on the noisy tokens of a forward only.

The clean tokens of a forward are computed by the base model, whatever the adapters are. So the model drafts with its
adapters and verifies by itself (verified_decoding.py). This file needs torch, transformers and safetensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import cached_file

from .generation import read_request
from .verified_decoding import VerifiedDecoding

ADAPTER_FILE = "noisy_adapter/adapter_model.safetensors"
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class LosslessMixin(nn.Module):
    """Adds what a lossless student has beside its base model; list it before the block-causal mixin.

    Without `noisy_lora` in the config it changes nothing.
    """

    config: Any
    generation_config: Any
    prefill_tokens: int
    _noisy: torch.Tensor | None = None
    """`[B, T]` bool, the tokens of the next forward that adapters act on; None: none of them."""
    _has_adapters = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **settings: Any) -> Any:
        """Loads the model, and then its adapters, which lie in a file of their own."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *arguments, **settings)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if getattr(model.config, "noisy_lora", None):
            where = {name: settings[name] for name in _HUB if name in settings}
            model.attach_adapters(load_file(cached_file(pretrained_model_name_or_path, ADAPTER_FILE, **where)))
        return loaded

    def attach_adapters(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts adapters into the layers that their tensors name, and the mask token's embedding."""
        settings = self.config.noisy_lora
        for name, up in tensors.items():
            if name.endswith(_UP):
                module: Any = self.get_submodule(name.removesuffix(_UP))
                down = tensors[name.removesuffix(_UP) + _DOWN]
                for key, value in (("noisy_down", down), ("noisy_up", up)):
                    module.register_buffer(key, value.to(module.weight), persistent=False)
                module.register_forward_hook(self._add)
        self._scale = settings["alpha"] / settings["rank"]
        embedding = self.get_input_embeddings()  # type: ignore[operator]
        (own,) = (value for name, value in tensors.items() if name.endswith(".mask_embedding"))
        embedding.register_buffer("mask_embedding", own.to(embedding.weight), persistent=False)
        embedding.register_forward_hook(self._embed)
        self._has_adapters = True

    def mark(self, noisy: torch.Tensor | None) -> None:
        """Says which tokens of the next forwards are noisy, `[B, T]` bool; None: none of them."""
        self._noisy = noisy

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *arguments: Any,
        noisy: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        """As the block-causal forward.

        Args:
            noisy: `[B, T]` bool, tokens that the adapters act on. None: those of the last block, if that holds a mask
                token; where a mask of four dimensions is given, or `inputs_embeds`, say it.
        """
        if not getattr(self.config, "noisy_lora", None):
            return super().forward(input_ids, attention_mask, *arguments, **others)
        self._require_adapters()
        if noisy is None:
            if input_ids is None or (attention_mask is not None and attention_mask.dim() == 4):
                raise ValueError("this model has adapters for noisy tokens: say which tokens are, by noisy=[B, T] bool")
            size, real = self.config.block_size, attention_mask
            real = torch.ones_like(input_ids) if real is None else real[:, -input_ids.shape[1] :]
            behind = real.flip(1).cumsum(1).flip(1)  # [B, T], tokens from this one to the end
            in_last = real.bool() & (behind <= size)  # the grid counts blocks back from the end
            noisy = in_last & ((input_ids == self.config.mask_token_id) & in_last).any(1, keepdim=True)
        self.mark(noisy)
        try:
            return super().forward(input_ids, attention_mask, *arguments, **others)
        finally:
            self.mark(None)

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: Any = None, **settings: Any
    ) -> torch.Tensor:
        """Writes what the base model writes, several tokens a forward; arguments as in the block-causal `generate`.

        Greedy, the tokens are the base model's. With `do_sample` they follow its distribution (speculative sampling).
        There is no `threshold`: a draft is right or wrong.
        """
        if not getattr(self.config, "noisy_lora", None):
            return super().generate(inputs, generation_config, **settings)  # type: ignore[misc]
        self._require_adapters()
        request = read_request(self, {"inputs": inputs, "generation_config": generation_config, **settings})
        return VerifiedDecoding(self, request, self.prefill_tokens).run()

    def _require_adapters(self) -> None:
        if not self._has_adapters:
            raise ValueError(f"the adapters ({ADAPTER_FILE}) are not loaded; load the model with from_pretrained")

    def _add(self, module: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """The output of a layer `[B, T, D]` with what its adapter adds to noisy tokens."""
        if self._noisy is None:
            return output
        narrow = nn.functional.linear(arguments[0], module.noisy_down)
        narrow = narrow.masked_fill(~self._noisy.to(narrow.device)[..., None], 0.0)
        return output + nn.functional.linear(narrow, module.noisy_up) * self._scale

    def _embed(self, module: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """The embeddings `[B, T, D]`, with the mask token's own where it is noisy."""
        if self._noisy is None:
            return output
        replaced = (arguments[0] == self.config.mask_token_id) & self._noisy
        return torch.where(replaced[..., None], module.mask_embedding, output)
