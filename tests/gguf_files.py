"""Writes tiny models as GGUF files, with the names, shapes and order of rows of llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.tiny import tiny_model

END, TURN = "<|end|>", "<|turn|>"
TOKENS = [*bytes_to_unicode().values(), "ab", "Ġa", END, TURN, "<|endoftext|>"]
"""The last one is a token that transformers gives to every Qwen2 tokenizer."""
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
"""A chat template."""
Change = Callable[[gguf.GGUFWriter], None]


def save_gguf(
    file: Path,
    architecture: str = "llama",
    model: Any = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    change: Change | None = None,
    leave_out: tuple[str, ...] = (),
    pre: str | None = "",
    tensors: dict[str, np.ndarray] | None = None,
    merges: Sequence[str] = ("a b", "Ġ a"),
    tokens: Sequence[str] = TOKENS,
) -> Any:
    """Writes a GGUF file and returns the model that is in it.

    Args:
        kind: number format of the matrices; vectors are float32.
        change: adds keys before the file is written.
        leave_out: GGUF names of tensors that the file does not get; `tokenizer` leaves that out.
        pre: `tokenizer.ggml.pre`; empty: the architecture's; None: left out.
        tensors: further ones.
        merges, tokens: of the tokenizer.
    """
    family = architecture if architecture in ("llama", "qwen2", "qwen3") else "llama"
    model = model or tiny_model(5, vocab_size=len(tokens), family=family, hidden_size=32, head_dim=16)
    config, out = model.config, gguf.GGUFWriter(file, architecture)
    out.add_name("tiny")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if "tokenizer" not in leave_out:
        out.add_tokenizer_model("gpt2")
        if pre is not None:
            out.add_tokenizer_pre(pre or {"qwen2": "qwen2"}.get(architecture, "gpt-2"))
        out.add_token_list(list(tokens))
        out.add_token_types([3 if token in (END, TURN) else 1 for token in tokens])
        out.add_token_merges(list(merges))
        out.add_eos_token_id(TOKENS.index(END))
        out.add_eot_token_id(TOKENS.index(TURN))
        out.add_pad_token_id(TOKENS.index(END))
        out.add_chat_template(TEMPLATE)
    if change is not None:
        change(out)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    weights = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): _as_llama_cpp(name, p.detach().numpy(), config, family)
        for name, p in model.named_parameters()
    }
    for name, values in (weights | (tensors or {})).items():
        if name in leave_out:
            continue
        if values.ndim == 2 and kind is not gguf.GGMLQuantizationType.F32:
            out.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            out.add_tensor(name, np.ascontiguousarray(values))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return model


def _as_llama_cpp(name: str, values: np.ndarray, config: Any, family: str) -> np.ndarray:
    """Rows of a llama's queries and keys alternate between the halves of a head (LlamaModel.permute)."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if family != "llama" or heads is None:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
