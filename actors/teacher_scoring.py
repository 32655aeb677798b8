"""Scoring a trajectory: one causal forward over the clean tokens (METHOD.md section 3). Pure torch.

The target of response position i is the teacher's distribution after `x0[< i]`, so it is read at column `P + i - 1`.
The output matrix is applied at response positions only, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from common.batches import batches_by_length
from common.models import hidden_states, input_device
from common.tensors import tensor_to_array
from common.types import HiddenTargets, LogitsTargets, TeacherTargets, TopKTargets, Trajectory

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
        chosen = [trajectories[i] for i in batch]
        lengths = [t.response_length for t in chosen]
        made = _make_targets(model, _hidden_after_prefix(model, chosen), lengths, kind, top_k)
        for i, target in zip(batch, made, strict=True):
            targets[i] = target
    return [target for target in targets if target is not None]


def _clean_length(trajectory: Trajectory) -> int:
    # The last token predicts nothing that is asked for.
    return len(trajectory.prompt_ids) + trajectory.response_length - 1


@torch.inference_mode()
def _hidden_after_prefix(model: Any, trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """The hidden state from which each response token is predicted, one trajectory after the other: `[sum R, D]`."""
    lengths = [_clean_length(t) for t in trajectories]
    # Right padding under a causal mask: no real token sees it, so no mask is needed.
    ids = np.zeros((len(trajectories), max(lengths)), dtype=np.int64)
    for row, t in enumerate(trajectories):
        ids[row, : lengths[row]] = np.concatenate([t.prompt_ids, t.response])[:-1]
    hidden = hidden_states(model, torch.from_numpy(ids).to(input_device(model)))
    return torch.cat([hidden[row, len(t.prompt_ids) - 1 : lengths[row]] for row, t in enumerate(trajectories)])


@torch.inference_mode()
def _make_targets(
    model: Any, hidden: torch.Tensor, lengths: list[int], kind: str, top_k: int
) -> Iterator[TeacherTargets]:
    """Targets of each trajectory. `lengths`: R of each, whose hidden states `[sum R, D]` follow one another."""

    def logits_of(states: torch.Tensor) -> Iterator[torch.Tensor]:
        return (model.lm_head(part).float() for part in states.split(LOGITS_CHUNK))

    if kind == "hidden":
        yield from (HiddenTargets(tensor_to_array(states)) for states in hidden.split(lengths))
    elif kind == "logits":  # one trajectory at a time: they are large
        for states in hidden.split(lengths):
            yield LogitsTargets(tensor_to_array(torch.cat(list(logits_of(states)))))
    else:
        tops = [_log_top_k(chunk, top_k) for chunk in logits_of(hidden)]
        ids, logprobs = (torch.cat(tensors).cpu().split(lengths) for tensors in zip(*tops, strict=True))
        for own_ids, own_logprobs in zip(ids, logprobs, strict=True):
            arrays = tensor_to_array(own_ids.to(torch.int32)), tensor_to_array(own_logprobs)
            yield TopKTargets(*arrays, model.lm_head.out_features)


def _log_top_k(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K likeliest of `[N, V]` and their log-probabilities over all V, `[N, K]` each."""
    log_p = logits.log_softmax(-1)
    ids = top_k_ids(log_p, top_k)
    return ids, log_p.gather(-1, ids)


def top_k_ids(values: torch.Tensor, k: int, group: int = 64) -> torch.Tensor:
    """What `values.topk(k).indices` gives for `[N, V]` (equal values in any order), in one reading of the values.

    The k highest lie in the k groups whose maxima are highest, so only those have to be sorted.
    """
    if values.shape[-1] % group or values.shape[-1] <= k * group:
        return values.topk(k, dim=-1).indices
    grouped = values.unflatten(-1, (-1, group))
    groups = grouped.amax(-1).topk(k, dim=-1).indices  # [N, k]
    candidates = grouped.gather(-2, groups[..., None].expand(-1, -1, group)).flatten(-2)
    places = candidates.topk(k, dim=-1).indices
    return groups.gather(-1, places // group) * group + places % group
