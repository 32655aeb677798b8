"""Where samples come from: the student's own rollouts, or given responses. References out; tensors stay with actors.

`on policy`:  decode (rollout pool) ─► score (teacher pool) ─► ScoredTrajectory
`off policy`: given response ────────► score (teacher pool) ─► ScoredTrajectory
`cft`:        given response ────────► its own tokens are the targets
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import ray

from actors.decode_settings import DecodeSettings
from actors.pool import ActorPool
from common.config import OpdlmConfig
from common.curriculum import dynamic_threshold, length_limit
from common.grid import BlockGrid
from common.prompts import PromptOrder
from common.types import RolloutRequest, ScoredTrajectory, TopKTargets, Trajectory, WeightHandle
from deploy.telemetry import Telemetry


class SampleSource(Protocol):
    """Makes samples of indices in the run's order of prompts; may be called again for the same ones after a failure."""

    async def sample(self, indices: list[int], weights: WeightHandle) -> tuple[list[Any], int]:
        """Returns (references to one `ScoredTrajectory` an index, the weight version they belong to)."""
        ...


class OnPolicySource:
    """Decodes with the newest weights, then scores."""

    def __init__(
        self, config: OpdlmConfig, rollouts: ActorPool, teachers: ActorPool, order: PromptOrder, telemetry: Telemetry
    ) -> None:
        self.config, self.rollouts, self.teachers = config, rollouts, teachers
        self.order, self.telemetry = order, telemetry
        self.settings = DecodeSettings.from_config(config.rollout)

    async def sample(self, indices: list[int], weights: WeightHandle) -> tuple[list[Any], int]:
        """See `SampleSource`."""
        batch, count = self.config.rollout.batch_size, len(indices)
        requests = [rollout_request(self.config, self.order, index) for index in indices]
        trajectories, decoded = await self.rollouts.call(
            "decode", requests, weights, self.settings, batch, outputs=count
        )
        scored, stats = await self.teachers.call("score", *trajectories, outputs=count)
        self.telemetry.decoded(decoded)
        self.telemetry.scored(stats)
        return scored, decoded.weight_version


def rollout_request(config: OpdlmConfig, order: PromptOrder, index: int) -> RolloutRequest:
    """What is decoded for a sample: prompt, limit and threshold of its round, a seed of its own."""
    prompt, round_ = order[index], index // config.rollout.prompts_per_round
    return RolloutRequest(
        index=index,
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.ids,
        max_new_tokens=length_limit(config, round_, prompt.domain, prompt.max_new_tokens),
        seed=config.run.seed * 1_000_003 + index,
        threshold=dynamic_threshold(config, round_),
    )


class GivenSource:
    """Given responses as trajectories without a history: only `random_mask` makes states of them.

    Args:
        responses: `[R] int32` by prompt id; a response longer than the round's limit is cut there.
        vocab_size: the teacher's V.
        eos_ids: tokens that end a response.
    """

    def __init__(
        self,
        config: OpdlmConfig,
        teachers: ActorPool,
        order: PromptOrder,
        telemetry: Telemetry,
        responses: dict[str, np.ndarray],
        vocab_size: int,
        eos_ids: Sequence[int],
    ) -> None:
        self.config, self.teachers, self.order, self.telemetry = config, teachers, order, telemetry
        self.responses, self.vocab_size, self.eos_ids = responses, vocab_size, tuple(eos_ids)
        self.grid = BlockGrid(config.rollout.block_size, config.rollout.block_grid)

    async def sample(self, indices: list[int], weights: WeightHandle) -> tuple[list[Any], int]:
        """See `SampleSource`. Given responses are never stale: they belong to the version of the moment."""
        trajectories = [self._trajectory(index, weights.version) for index in indices]
        if self.config.objective.kind == "cft":
            return [ray.put(ScoredTrajectory(t, self._one_hot(t))) for t in trajectories], weights.version
        scored, stats = await self.teachers.call("score", *trajectories, outputs=len(indices))
        self.telemetry.scored(stats)
        return scored, weights.version

    def _trajectory(self, index: int, version: int) -> Trajectory:
        prompt, round_ = self.order[index], index // self.config.rollout.prompts_per_round
        limit = length_limit(self.config, round_, prompt.domain, prompt.max_new_tokens)
        response = self.responses[prompt.prompt_id]
        return given_trajectory(index, prompt.prompt_id, prompt.ids, response, limit, self.eos_ids, self.grid, version)

    def _one_hot(self, trajectory: Trajectory) -> TopKTargets:
        # Cross-entropy on a token is the forward KL to the distribution that is certain of it: top-1 at log 1.
        token_ids = trajectory.response[:, None]
        return TopKTargets(token_ids, np.zeros(token_ids.shape, np.float32), self.vocab_size)


def given_trajectory(
    index: int,
    prompt_id: str,
    prompt_ids: np.ndarray,
    response: np.ndarray,
    limit: int,
    eos_ids: Sequence[int],
    grid: BlockGrid,
    version: int,
) -> Trajectory:
    """A response as a trajectory; what fills its last block is what a decoder could have seen there.

    A finished response is filled up with its end-of-sequence token. One that goes on behind the limit shows its own
    next tokens (no loss is taken there); one of which no more is known ends with its last whole block instead, so that
    no false end is ever seen.

    Args:
        response: `[R] int32`; what lies behind its first end-of-sequence token is left out.
        limit: most tokens with a loss.
    """
    ends = np.flatnonzero(np.isin(response, eos_ids))
    whole = response[: ends[0] + 1] if ends.size else response
    length = min(len(whole), limit)
    kept = grid.kept_length(len(prompt_ids), length)
    if not ends.size and kept > len(whole) and (shorter := kept - grid.block_size) > 0:
        length = kept = shorter
    filled = np.full(kept, whole[-1] if ends.size else eos_ids[0], dtype=np.int32)
    shown = whole[:kept]
    filled[: len(shown)] = shown
    finished = bool(ends.size) and length == len(whole)
    return Trajectory(
        index=index,
        prompt_id=prompt_id,
        prompt_ids=prompt_ids,
        response_ids=filled,
        reveal_step=np.ones(kept, dtype=np.int16),
        response_length=length,
        weight_version=version,
        finish_reason="eos" if finished else "length",
        denoising_steps=0,
    )
