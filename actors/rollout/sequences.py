"""A sequence before and after it has a slot: which requests can be decoded, and what a finished one becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.grid import BlockGrid, DraftGrid, decoding_grid
from opdlm.common.types import FinishReason, HiddenTargets, RolloutRequest, ScoredTrajectory, Trajectory

CACHE_SETTING = "rollout.cache_tokens"


def grid_of(settings: DecodeSettings) -> BlockGrid | DraftGrid:
    """Where the steps of a decoder begin, and what room they need."""
    return decoding_grid(settings.strategy, settings.block_size, settings.block_grid)


def extent(request: RolloutRequest, grid: BlockGrid | DraftGrid) -> tuple[int, int]:
    """Places in the cache of a sequence when it begins, to the end of its first block, and at most."""
    length = request.prompt_ids.size
    return grid.first_block_start(length) + grid.room, grid.end_position(length, request.max_new_tokens)


def check_requests(
    requests: Sequence[RolloutRequest], grid: BlockGrid | DraftGrid, context: int, cache_limit: int | None
) -> None:
    """Refuses requests that cannot be decoded.

    Args:
        context: the model's positions.
        cache_limit: positions of the cache; None: it grows.

    Raises:
        ValueError: a prompt is empty, or prompt and response do not fit into the context or the cache.
    """
    for request in requests:
        if request.prompt_ids.size == 0:
            raise ValueError(f"prompt {request.prompt_id} is empty; a response needs a token before it")
        if request.max_new_tokens < 1:
            raise ValueError(
                f"prompt {request.prompt_id}: max_new_tokens is {request.max_new_tokens}; it must be at least 1"
            )
        positions = grid.context(request.prompt_ids.size, request.max_new_tokens)
        needs = (positions, context, "the model's context"), (extent(request, grid)[1], cache_limit, CACHE_SETTING)
        for end, room, whose in needs:
            if room is not None and end > room:
                raise ValueError(
                    f"prompt {request.prompt_id}: {request.prompt_ids.size} prompt tokens and {request.max_new_tokens} "
                    f"new tokens take {end} positions, to the end of their last block; {whose} is {room}"
                )


def trajectory_of(
    request: RolloutRequest,
    tokens: np.ndarray,
    reveal: np.ndarray,
    history: Sequence[tuple[int, int]],
    eos_ids: Sequence[int],
    noted: np.ndarray | None = None,
) -> Trajectory:
    """The trajectory of a finished sequence.

    Args:
        tokens: `[T]` int64, prompt and response.
        reveal: `[T]` int64, the denoising step that revealed each token; 0: none, as for the prompt.
        history: for each weight version that decoded it: (denoising steps done before it, version).
        eos_ids: tokens that end a response.
        noted: of each token `[T]` its log-probability, or `[T, D]` the hidden state that predicted it (`Trajectory`).
    """
    start, end = request.prompt_ids.size, int(reveal.nonzero()[0][-1]) + 1
    ends = np.flatnonzero(np.isin(tokens[start : min(end, start + request.max_new_tokens)], list(eos_ids)))
    length = int(ends[0]) + 1 if len(ends) else min(end - start, request.max_new_tokens)
    if not reveal[start:end].all():  # it ended before its last block was finished, so what is behind it has holes
        end = start + length
    response, reveal = tokens[start:end].astype(np.int32), reveal[start:end].astype(np.int32)
    steps_before, numbers = zip(*history, strict=True)
    # A token of step k has the last version that began before step k.
    versions = np.array(numbers, dtype=np.int32)[np.searchsorted(steps_before, reveal) - 1]
    reason: FinishReason = "eos" if len(ends) else "length" if length == request.max_new_tokens else "stop"
    return Trajectory(
        index=request.index,
        prompt_id=request.prompt_id,
        prompt_ids=request.prompt_ids,
        response_ids=response,
        reveal_step=reveal,
        response_length=length,
        weight_version=int(versions.min()),
        finish_reason=reason,
        denoising_steps=int(reveal.max()),
        token_versions=versions if versions.min() < versions.max() else None,
        reveal_logprob=noted[start:end] if noted is not None and noted.ndim == 1 else None,
        clean_hidden=noted[start : start + length] if noted is not None and noted.ndim > 1 else None,
    )


def as_sample(trajectory: Trajectory) -> Trajectory | ScoredTrajectory:
    """A trajectory that brings its own targets, as a sample; any other stays a trajectory."""
    if trajectory.clean_hidden is None:
        return trajectory
    return ScoredTrajectory(replace(trajectory, clean_hidden=None), HiddenTargets(trajectory.clean_hidden))


def steps_by_tokens(trajectories: Sequence[Trajectory], most: int) -> tuple[int, ...]:
    """How many steps wrote 1, 2, ... `most` tokens of the responses of these trajectories."""
    counts = np.zeros(most + 1, dtype=np.int64)
    for trajectory in trajectories:
        written = np.bincount(trajectory.reveal_step[: trajectory.response_length])
        counts += np.bincount(written[written > 0], minlength=most + 1)
    return tuple(counts[1:].tolist())
