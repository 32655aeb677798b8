"""Small random models and trajectories for tests. Weights are drawn wide, so that logits differ from each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.char_tokenizer import build_char_tokenizer
from common.types import RolloutRequest, Trajectory

MASK, EOS = 31, 2
VOCABULARY = 32


def tiny_model(
    seed: int = 0,
    vocab_size: int = VOCABULARY,
    tied: bool = False,
    context: int = 128,
    hidden_size: int = 16,
    head_dim: int = 8,
) -> Qwen3ForCausalLM:
    """A Qwen3 of two layers, float32, eval mode."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.4,
    )
    return Qwen3ForCausalLM(config).eval()


def request(
    prompt_length: int, index: int = 0, limit: int = 12, seed: int = 0, vocab: int = VOCABULARY
) -> RolloutRequest:
    """A random prompt (pad, end-of-sequence and mask ids among its tokens: they are ordinary there)."""
    ids = np.random.default_rng([seed, index]).integers(0, vocab, prompt_length).astype(np.int32)
    return RolloutRequest(index, f"test/{index}", ids, limit, seed=seed * 1000 + index)


def trajectory(prompt: list[int], response: list[int], steps: list[int], length: int | None = None) -> Trajectory:
    """A trajectory written out by hand; it ends with an end-of-sequence token if its last response token is one."""
    length = len(response) if length is None else length
    return Trajectory(
        index=0,
        prompt_id="test/0",
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
        reveal_step=np.array(steps, dtype=np.int16),
        response_length=length,
        weight_version=0,
        finish_reason="eos" if response[length - 1] == EOS else "length",
        denoising_steps=max(steps),
    )


def save_teacher(
    folder: Path, seed: int = 0, hidden_size: int = 16, context: int = 128, alphabet: str = "0123456789+-=;"
) -> Path:
    """A random teacher for the chain task, with its tokenizer, as a checkpoint folder."""
    tokenizer = build_char_tokenizer(alphabet)
    model = tiny_model(seed, vocab_size=len(tokenizer), hidden_size=hidden_size, context=context)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
