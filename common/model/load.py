"""Loads causal LMs of transformers as teacher or student, and calls them for hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from opdlm.common.errors import OpdlmError
from opdlm.common.model.config import EMBEDDING, OUTPUT, read_config
from opdlm.common.model.shards import read_shards


def load_model(
    folder: str | Path, dtype: str = "float32", attention: str = "sdpa", device_map: str | None = None
) -> Any:
    """Loads weights (safetensors only) for either role.

    Args:
        folder: Hugging Face layout.
        dtype: number format of the weights in memory; `auto` keeps the stored one.
        attention: `sdpa` (dense boolean or causal masks) or `flex_attention` (block masks, GPU).
        device_map: `auto` spreads the layers over the devices of this process (needs accelerate).

    Returns: a causal LM of transformers, in eval mode, on the CPU unless `device_map` says otherwise.
    """
    config = read_config(folder)
    read_shards(folder)  # pickles, missing and damaged files are named here
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            device_map=device_map,
            trust_remote_code=False,
        )
    except OSError as error:
        raise OpdlmError(f"model folder {folder}: {' '.join(str(error).split())}") from None
    return model.eval()


def hidden_states(
    model: Any,
    input_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    mask: Any = None,
    cache: Any = None,
    **others: Any,
) -> torch.Tensor:
    """Final hidden states, before the output matrix.

    Args:
        input_ids: `[B, T]` int64; None with `inputs_embeds`.
        position_ids: `[B, T]` int64; None counts from 0.
        mask: `[B, 1, T, T']`, bool (True = attended) or added to the scores, or a flex BlockMask; None is causal.
        cache: object with `update(keys, values, layer)`.
        others: `inputs_embeds` `[B, T, D]` in place of ids; what else the attention function takes.

    Returns: `[B, T, D]` in the model's dtype.
    """
    output = model.model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=False,
        **others,
    )
    return output.last_hidden_state


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids: at its embedding, which `device_map` may put apart from other layers."""
    return model.get_input_embeddings().weight.device


def load_output_matrix(folder: str | Path, dtype: str) -> torch.Tensor:
    """The output matrix `[V, D]` alone, without loading the model; the embedding where the two are tied."""
    name = EMBEDDING if read_config(folder).tie_word_embeddings else OUTPUT
    return read_shards(folder).load(name).to(getattr(torch, dtype))
