"""Scoring a trajectory: one causal forward over the clean tokens (METHOD.md section 3). Pure torch.

The target of response position i is the teacher's distribution after `x0[< i]`, so it is read at column `P + i - 1`.
The output matrix is applied at response positions only, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opdlm.common.batches import batches_by_length
from opdlm.common.model.load import hidden_states, input_device
from opdlm.common.tensors import tensor_to_array
from opdlm.common.types import HiddenTargets, LogitsTargets, TeacherTargets, TopKTargets, Trajectory

LOGITS_CHUNK = 1024  # positions whose full-vocabulary logits exist at one time


def score(
    model: Any, trajectories: Sequence[Trajectory], kind: str, top_k: int, batch_tokens: int
) -> list[TeacherTargets]:
    """Targets of each trajectory, in order.

    Args:
        model: the frozen teacher, a causal LM of transformers in eval mode.
        kind: `hidden`, `topk` or `logits`.
        top_k: K of `topk`; at most the vocabulary.
        batch_tokens: most tokens in one forward, padding included.
    """
    targets: list[TeacherTargets | None] = [None] * len(trajectories)
    for batch in batches_by_length([_clean_length(t) for t in trajectories], batch_tokens):
        hidden = _hidden_after_prefix(model, [trajectories[i] for i in batch])
        for i, states in zip(batch, hidden, strict=True):
            targets[i] = _make_targets(model, states, kind, top_k)
    return [target for target in targets if target is not None]


def _clean_length(trajectory: Trajectory) -> int:
    # The last token predicts nothing that is asked for.
    return len(trajectory.prompt_ids) + trajectory.response_length - 1


@torch.inference_mode()
def _hidden_after_prefix(model: Any, trajectories: Sequence[Trajectory]) -> list[torch.Tensor]:
    """`[R, D]` for each: the hidden state from which each response token is predicted."""
    lengths = [_clean_length(t) for t in trajectories]
    # Right padding under a causal mask: no real token sees it, so no mask is needed.
    ids = np.zeros((len(trajectories), max(lengths)), dtype=np.int64)
    for row, t in enumerate(trajectories):
        ids[row, : lengths[row]] = np.concatenate([t.prompt_ids, t.response])[:-1]
    hidden = hidden_states(model, torch.from_numpy(ids).to(input_device(model)))
    return [hidden[row, len(t.prompt_ids) - 1 : lengths[row]] for row, t in enumerate(trajectories)]


@torch.inference_mode()
def _make_targets(model: Any, hidden: torch.Tensor, kind: str, top_k: int) -> TeacherTargets:
    if kind == "hidden":
        return HiddenTargets(tensor_to_array(hidden))
    chunks = [model.lm_head(part).float() for part in hidden.split(LOGITS_CHUNK)] if kind == "logits" else []
    if kind == "logits":
        return LogitsTargets(tensor_to_array(torch.cat(chunks)))
    tops = [model.lm_head(part).float().log_softmax(-1).topk(top_k, dim=-1) for part in hidden.split(LOGITS_CHUNK)]
    return TopKTargets(
        token_ids=tensor_to_array(torch.cat([top.indices for top in tops]).to(torch.int32)),
        logprobs=tensor_to_array(torch.cat([top.values for top in tops])),
        vocab_size=model.lm_head.out_features,
    )
