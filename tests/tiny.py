"""Small random models, requests and trajectories for tests.

Weights have a large standard deviation, so that the logits of different tokens differ clearly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opdlm.common.config.base import Grid
from opdlm.common.config.schema import LoraConfig
from opdlm.common.form import StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.model.adapters import NoisyAdapters, adapter_parameters
from opdlm.common.model.char_tokenizer import build_char_tokenizer
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.folder import save_student
from opdlm.common.model.load import load_model
from opdlm.common.tensors import tensor_to_array
from opdlm.common.types import (
    HiddenTargets,
    LogitsTargets,
    RolloutRequest,
    ScoredTrajectory,
    TeacherTargets,
    TopKTargets,
    Trajectory,
)

FORMS_AND_GRIDS: list[tuple[StudentForm, Grid]] = [
    (StudentForm(shift, context), grid)
    for shift in (False, True)
    for context, grid in (("block_causal", "absolute"), ("block_causal", "response"), ("causal", "response"))
]
"""Every form of a student on every grid that it can have."""
MASK, EOS = 31, 2
VOCABULARY = 32


def tiny_model(
    seed: int = 0,
    vocab_size: int = VOCABULARY,
    tied: bool = False,
    context: int = 128,
    hidden_size: int = 16,
    head_dim: int = 8,
    family: str = "qwen3",
    **settings: Any,
) -> Any:
    """A causal language model of two layers, in float32 and eval mode. `settings`: further fields of its config."""
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.4,
        **(heads | settings),
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # biases start at zero, and a test would not notice if they were left out
            torch.nn.init.normal_(parameter, std=0.4)
    return model


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2"},
    "llama": {"family": "llama", "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
    "mistral": {"family": "mistral", "sliding_window": None},
    "phi3": {"family": "phi3", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "smollm3": {"family": "smollm3", "no_rope_layers": [0, 1]},  # its first layer has no rotation
    "olmo2": {"family": "olmo2"},
    "qwen3-heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3-yarn": {"rope_parameters": YARN_ROPE, "attention_bias": True},
}
"""Keyword arguments of `tiny_model` for the other supported families and features."""


def request(
    prompt_length: int, index: int = 0, limit: int = 12, seed: int = 0, vocab: int = VOCABULARY
) -> RolloutRequest:
    """A request with a random prompt, which may contain the ids of padding, end of sequence and mask.

    In a prompt they are ordinary tokens.
    """
    ids = np.random.default_rng([seed, index]).integers(0, vocab, prompt_length).astype(np.int32)
    return RolloutRequest(index, f"test/{index}", ids, limit, seed=seed * 1000 + index)


def trajectory(prompt: list[int], response: list[int], steps: list[int], length: int | None = None) -> Trajectory:
    """A trajectory of the given tokens.

    Args:
        response: the kept tokens.
        steps: reveal step of each kept token.
        length: tokens of the response itself; None: all kept tokens. If the last of them is EOS, it is the reason for
            the end.
    """
    length = len(response) if length is None else length
    return Trajectory(
        index=0,
        prompt_id="test/0",
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
        reveal_step=np.array(steps, dtype=np.int32),
        response_length=length,
        weight_version=0,
        finish_reason="eos" if response[length - 1] == EOS else "length",
        denoising_steps=max(steps),
    )


def save_teacher(
    folder: Path,
    seed: int = 0,
    spare_rows: int = 0,
    max_shard_size: str = "5GB",
    alphabet: str = "0123456789+-=;",
    **model: Any,
) -> Path:
    """Saves a random teacher for the chain task and its tokenizer as a checkpoint folder.

    Args:
        spare_rows: rows of the embedding beyond the tokenizer's tokens.
        model: keyword arguments of `tiny_model`.
    """
    tokenizer = build_char_tokenizer(alphabet)
    teacher = tiny_model(seed, vocab_size=len(tokenizer) + spare_rows, **model)
    teacher.config.eos_token_id = teacher.generation_config.eos_token_id = tokenizer.eos_token_id
    teacher.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def save_lossless(teacher: Path, root: Path) -> Path:
    """Saves a student of a teacher in `root/student`; its random adapters act on noisy tokens alone."""
    convert_checkpoint(teacher, root / "start", 4, "response", logit_shift=True, context="causal")
    model = load_model(root / "start")
    NoisyAdapters(model, LoraConfig(rank=2), read_facts(root / "start").mask_id, 0)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.normal_(std=0.3)
    save_student(model, root / "start", root / "student", BlockGrid(4, "response"))
    return root / "student"


def scored(index: int, kind: str, seed: int, prompt: int = 3, kept: int = 8, length: int = 6) -> ScoredTrajectory:
    """A scored trajectory with random contents.

    Args:
        kind: of its targets: `hidden`, `topk` or `logits`.
        prompt, kept, length: tokens of the prompt, of the response with its filled last block, and of the response.
    """
    rng = np.random.default_rng([seed, index])
    targets: TeacherTargets
    if kind == "hidden":
        states = torch.from_numpy(rng.normal(size=(length, 5)))
        targets = HiddenTargets(tensor_to_array(states.to(torch.bfloat16 if index % 2 else torch.float32)))
    elif kind == "topk":
        tokens = rng.integers(0, 11, (length, 2)).astype(np.int32)
        targets = TopKTargets(tokens, rng.normal(size=(length, 2)).astype(np.float32), 11)
    else:
        targets = LogitsTargets(rng.normal(size=(length, 11)).astype(np.float32))
    trajectory = Trajectory(
        index=index,
        prompt_id=f"données/{index} \"'<\n",
        prompt_ids=rng.integers(0, 11, prompt).astype(np.int32),
        response_ids=rng.integers(0, 11, kept).astype(np.int32),
        reveal_step=rng.integers(1, 99_999, kept).astype(np.int32),
        response_length=length,
        weight_version=int(rng.integers(0, 5)),
        finish_reason="eos" if seed % 2 else "length",
        denoising_steps=int(rng.integers(1, 9)),
        token_versions=rng.integers(5, 9, kept).astype(np.int32) if (seed + index) % 3 == 0 else None,
    )
    return ScoredTrajectory(trajectory, targets)
