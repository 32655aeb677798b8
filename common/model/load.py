"""Loads causal language models of transformers, as teacher or student, and computes their hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from opdlm.common.errors import OpdlmError
from opdlm.common.model.adapters import mark_noisy, read_noisy_adapters
from opdlm.common.model.config import EMBEDDING, OUTPUT, read_config
from opdlm.common.model.end_tokens import check_generation_config
from opdlm.common.model.shards import read_shards, require_finite


def load_model(
    folder: str | Path, dtype: str = "float32", attention: str = "sdpa", device_map: str | None = None
) -> Any:
    """Loads the model of a checkpoint folder, from safetensors only.

    Args:
        folder: a checkpoint in Hugging Face layout.
        dtype: number format of the weights in memory; `auto` keeps the stored one.
        attention: `sdpa` (dense boolean or causal masks) or `flex_attention` (block masks, GPU only).
        device_map: `auto` spreads the layers over the devices of this process; a device's name puts them there (needs
            accelerate).

    Returns: a causal language model of transformers in eval mode, on the CPU unless `device_map` is given.

    Raises:
        OpdlmError: the folder holds no model that can be loaded, or a weight that is NaN or infinite.
    """
    config = read_config(folder)
    check_generation_config(Path(folder), config.vocab_size)
    read_shards(folder)  # raises for pickles, and for missing or damaged files
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            device_map=device_map,
            generation_config=GenerationConfig(),  # of the folder's, only the end tokens count
            trust_remote_code=False,
        )
    except OSError as error:
        raise OpdlmError(f"model folder {folder}: {' '.join(str(error).split())}") from None
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta":  # a part that a device map left on the disk
            require_finite(parameter, name, folder)
    read_noisy_adapters(model, Path(folder), config)
    model.get_input_embeddings().padding_idx = None  # every token's row learns; padding is known by its position
    return model.eval()


def hidden_states(
    model: Any,
    input_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    mask: Any = None,
    cache: Any = None,
    noisy: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """Computes the final hidden states, to which the output matrix is applied for logits.

    Args:
        input_ids: `[B, T]` int64; None where `inputs_embeds` is given.
        position_ids: `[B, T]` int64; None counts from 0.
        mask: `[B, 1, T, T']`, bool (True: the query sees the key) or float (added to the scores), or a BlockMask of
            flex_attention. None is a causal mask.
        cache: an object with `update(keys, values, layer)`.
        noisy: `[B, T]` bool, the tokens that adapters on noisy tokens alone act on, where the model has some; None:
            none of them.
        others: `inputs_embeds` `[B, T, D]` in place of ids, and keyword arguments of the attention function.

    Returns: `[B, T, D]` in the model's dtype.
    """
    mark_noisy(model, noisy)
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
    """Returns the device for token ids: that of the embedding. With a `device_map`, other layers may be elsewhere."""
    return model.get_input_embeddings().weight.device


def load_output_matrix(folder: str | Path, dtype: str) -> torch.Tensor:
    """Loads the output matrix `[V, D]` without the rest of the model; in a tied model it is the embedding.

    Args:
        dtype: torch's name of its number format in memory, such as `bfloat16`.
    """
    name = EMBEDDING if read_config(folder).tie_word_embeddings else OUTPUT
    matrix = read_shards(folder).load(name).to(getattr(torch, dtype))
    require_finite(matrix, name, folder)
    return matrix
