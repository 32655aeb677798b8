"""Scores trajectories with the frozen teacher: one causal forward over the clean tokens (METHOD.md section 3). No Ray.

One training step, in reading order: deploy/run/train.py (the driver) -> deploy/run/loops.py ->
actors/rollout/decoder.py -> this file -> actors/queue/rules.py -> learner/train_step.py -> learner/losses.py. A teacher
actor (`actors/teacher/actor.py`) calls `score` with trajectories that the rollout actors decoded; each trajectory and
its targets become one sample of the replay queue.

The target of response position i is the teacher's next-token distribution after `x0[< i]`. A causal model gives it at
the position of the token before, column `P + i - 1`. The output matrix is applied at response positions only, a chunk
at a time. Shapes: P prompt tokens, R response tokens, D hidden size, V vocabulary (to its last token), K top tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opdlm.actors.progress import OnBatch, unheard
from opdlm.common.batches import batches_by_length
from opdlm.common.errors import OpdlmError
from opdlm.common.model.load import hidden_states, input_device
from opdlm.common.tensors import is_finite, tensor_to_array
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import HiddenTargets, LogitsTargets, TeacherTargets, TopKTargets, Trajectory

LOGITS_CHUNK = 1024
"""Positions whose full-vocabulary logits exist at one time."""


def score(
    model: Any,
    trajectories: Sequence[Trajectory],
    kind: str,
    top_k: int,
    batch_tokens: int,
    tokens: TokenIds | None = None,
    on_batch: OnBatch = unheard,
) -> list[TeacherTargets]:
    """The targets of each trajectory, in the order of the trajectories.

    Args:
        model: the frozen teacher, a causal LM of transformers in eval mode.
        kind: `hidden` (states `[R, D]`), `topk` (tokens and log-probabilities `[R, K]`) or `logits` (`[R, V]`); see
            `common/types.py` for dtypes.
        top_k: K of `topk`; at most the number of tokens.
        batch_tokens: most tokens in one forward, padding included; a longer trajectory gets a forward of its own.
        tokens: the rows of the vocabulary that are tokens; the distributions are over them. None: all rows.
        on_batch: called after each forward.

    Raises:
        OpdlmError: the teacher's hidden states are not finite.
    """
    tokens = TokenIds(model.lm_head.out_features) if tokens is None else tokens
    targets: list[TeacherTargets | None] = [None] * len(trajectories)
    for batch in batches_by_length([_clean_length(t) for t in trajectories], batch_tokens):
        hidden = _hidden_after_prefix(model, [trajectories[i] for i in batch])
        for i, states in zip(batch, hidden, strict=True):
            if not is_finite(states):
                raise OpdlmError(
                    f"teacher: its hidden states of sample {trajectories[i].index} ({trajectories[i].prompt_id}) hold "
                    "NaN or infinity; its weights or its number format (teacher.dtype) are broken"
                )
            targets[i] = _make_targets(model, states, kind, top_k, tokens)
        on_batch(batch)
    return [target for target in targets if target is not None]


def _clean_length(trajectory: Trajectory) -> int:
    """P + R - 1: tokens of the forward. The last response token is left out, since no target comes after it."""
    return len(trajectory.prompt_ids) + trajectory.response_length - 1


@torch.inference_mode()
def _hidden_after_prefix(model: Any, trajectories: Sequence[Trajectory]) -> list[torch.Tensor]:
    """For each trajectory, the hidden states `[R, D]` from which its response tokens are predicted."""
    lengths = [_clean_length(t) for t in trajectories]
    # The padding is on the right. Under causal attention no real token sees it, so it needs no mask.
    ids = np.zeros((len(trajectories), max(lengths)), dtype=np.int64)
    for row, t in enumerate(trajectories):
        ids[row, : lengths[row]] = np.concatenate([t.prompt_ids, t.response])[:-1]
    hidden = hidden_states(model, torch.from_numpy(ids).to(input_device(model)))
    return [hidden[row, len(t.prompt_ids) - 1 : lengths[row]] for row, t in enumerate(trajectories)]


@torch.inference_mode()
def _make_targets(model: Any, hidden: torch.Tensor, kind: str, top_k: int, tokens: TokenIds) -> TeacherTargets:
    """The targets of one trajectory from its hidden states `[R, D]`."""
    if kind == "hidden":
        return HiddenTargets(tensor_to_array(hidden))
    holes = sorted(tokens.holes)

    def logits(states: torch.Tensor) -> torch.Tensor:
        """`[n, V]`, where V ends with the last token; minus infinity for a row that no token has."""
        whole = model.lm_head(states)[:, : tokens.end].float()
        if holes:
            whole[:, holes] = float("-inf")
        return whole

    chunks = hidden.split(LOGITS_CHUNK)
    if kind == "logits":
        return LogitsTargets(tensor_to_array(torch.cat([logits(chunk) for chunk in chunks])))
    tops = [logits(chunk).log_softmax(-1).topk(top_k, dim=-1) for chunk in chunks]
    return TopKTargets(
        token_ids=tensor_to_array(torch.cat([top.indices for top in tops]).to(torch.int32)),
        logprobs=tensor_to_array(torch.cat([top.values for top in tops])),
        vocab_size=tokens.end,
    )
