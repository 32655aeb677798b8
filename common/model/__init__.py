"""Checkpoints of language models: reading, loading, converting.

A checkpoint is a folder in Hugging Face layout. `read_config`, `read_facts`, `read_shards` and `load_tokenizer` read
its parts without loading weights; `check_vocabularies` and `check_tokenizers` compare a teacher with a student.
`load_model` loads the network and `hidden_states` runs it; a caller that computes attention itself passes an
`AttentionLayout`. `convert_checkpoint` makes a student from an autoregressive model; `folder` writes what all model
folders have beside their weights. A public name is imported with its
module when it is first used, so that each caller loads only the libraries that it needs.
"""

from __future__ import annotations

from opdlm.common.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "attention": ["ATTENTION", "AttentionLayout"],
        "char_tokenizer": ["build_char_tokenizer"],
        "config": ["EMBEDDING", "OUTPUT", "read_config"],
        "convert": [
            "check_tensors",
            "convert_checkpoint",
            "know_dtype",
            "mask_rows",
            "tied_copies",
            "write_teacher",
        ],
        "end_tokens": ["EndTokens", "as_setting", "read_end_tokens", "token_names"],
        "facts": [
            "ModelFacts",
            "check_vocabularies",
            "count_parameters",
            "read_facts",
            "require_mask",
            "shared_tokens",
        ],
        "families": ["SUPPORTED_TYPES"],
        "folder": ["own_layout", "save_model", "write_all_but_weights"],
        "gguf_convert": ["convert_gguf"],
        "gguf_file": ["is_gguf"],
        "hub": ["hub_id", "model_folder"],
        "load": ["hidden_states", "input_device", "load_model", "load_output_matrix"],
        "mask_token": ["MASK_TOKEN", "check_mask_row", "choose_mask", "mask_problem"],
        "prompt_encoder": ["PromptEncoder"],
        "shards": ["Shards", "check_finite", "copy_shards", "read_shards", "require_finite", "weights_fingerprint"],
        "tokenizer": ["check_tokenizers", "has_tokenizer", "load_tokenizer"],
    },
)
