"""Where samples come from. A source returns references; the tensors stay with the actors and the object store.

objective       sample
opd             decode (rollout pool) ─► score (teacher pool) ─► ScoredTrajectory
off_policy_kd   given response ────────► score (teacher pool) ─► ScoredTrajectory
cft             given response ────────► its own tokens are the targets
rl              decode a group ────────► judge (reward pool) ──► ScoredTrajectory with its advantage; with
                `objective.opd_weight` it is scored in between
run.replay      files of an earlier run (`replay.py`)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray

from opdlm.actors.pool import ActorPool
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.batches import in_groups
from opdlm.common.config import OpdlmConfig
from opdlm.common.curriculum import dynamic_threshold, length_limit
from opdlm.common.data.prompts import PromptOrder
from opdlm.common.grid import BlockGrid
from opdlm.common.model.config import read_config
from opdlm.common.model.facts import ModelFacts, never_drawn
from opdlm.common.samples import SampleRef, sample_refs, samples_per_reference
from opdlm.common.seeds import sample_seed
from opdlm.common.types import RolloutRequest, ScoredTrajectory, TopKTargets, Trajectory, WeightHandle
from opdlm.deploy.cluster.roles import Roles
from opdlm.deploy.observe.records import RunRecords
from opdlm.deploy.run.dealing import Dealer, Decoded
from opdlm.deploy.run.given_responses import GivenResponses, generate_responses, response_recipe
from opdlm.deploy.run.judging import Judging
from opdlm.deploy.run.preflight import Preflight, mark_of_reasoning
from opdlm.deploy.run.reference import add_reference
from opdlm.deploy.run.replay import ReplaySource
from opdlm.deploy.run.scoring import Scoring
from opdlm.learner.policy_gradient import Draws

_AHEAD_SHARE = 1 / 8
"""Requests that may wait in an actor, as a share of its slots, so that a slot need not wait for a message."""


class SampleSource(Protocol):
    """Makes the samples of given indices in the run's order of prompts. After a failure the same call is repeated."""

    together: int
    """Most samples that one call of `sample` makes. 1: each leaves as it is made."""

    async def room(self) -> int:
        """Waits until further samples may be asked for; returns how many."""
        ...

    async def sample(self, indices: list[int], weights: WeightHandle) -> tuple[list[SampleRef], list[int]]:
        """Returns (a reference to the `ScoredTrajectory` of each index, the oldest weights that decoded each)."""
        ...


async def open_source(
    checked: Preflight, start: ModelFacts, roles: Roles, records: RunRecords, responses: GivenResponses | None
) -> SampleSource:
    """The source that the run's objective needs.

    Args:
        start: the student as the run began.
        responses: given responses that are known already. Where the objective needs some and there are none, the
            teacher pool writes them now, which takes as long as it takes.
    """
    config, student = checked.config, checked.student  # the student decodes, so its end tokens are the run's
    longest_prompt = max(len(prompt.ids) for prompt in checked.prompts.prompts)
    per_reference = samples_per_reference(config, read_config(config.model.teacher), longest_prompt)
    round_size = config.rollout.samples_per_round
    if config.run.replay is not None:
        return ReplaySource(Path(config.run.replay), round_size, per_reference)
    if config.rollouts_bring_targets:
        return OnPolicySource(config, roles.rollouts, records, _sample_of, checked.order)
    scoring = Scoring(roles.teachers, records, per_reference, config.teacher.batch_tokens, round_size)
    if config.objective.kind == "opd":
        return OnPolicySource(config, roles.rollouts, records, scoring.score, checked.order)
    if roles.rewards is not None:
        rounds = config.checkpoint.every_rounds + config.queue.max_staleness + 1
        kept, complete = rounds * config.rollout.prompts_per_round, reference_of(config, roles, start)
        judging = Judging(roles.rewards, records, checked.order, kept, complete)

        async def score_and_judge(decoded: Decoded) -> SampleRef:
            scored = await scoring.score(decoded)
            return await judging.judge(replace(decoded, group=scored.group, place=scored.place))

        both = score_and_judge if config.objective.asks_teacher else judging.judge
        return OnPolicySource(config, roles.rollouts, records, both, checked.order, judging.expect)
    if responses is None:
        recipe = response_recipe(config, checked.order.digest)
        prompts = checked.order.used(checked.schedule.total)
        responses = await generate_responses(config, prompts, roles.teachers, recipe, records.progress)
    cut = responses.cut_at_inner_end(student.eos_ids)
    records.given(len(responses.by_prompt), responses.forward_tokens, responses.cached, cut)
    vocab_size = checked.teacher.tokens.end
    given = responses.by_prompt, vocab_size, student.eos_ids
    return GivenSource(config, scoring, checked.order, *given, mark_of_reasoning(config, checked.tokenizer))


async def _sample_of(decoded: Decoded) -> SampleRef:
    """A trajectory that is a sample already."""
    return SampleRef(decoded.group, decoded.place, *decoded.lengths)


def reference_of(config: OpdlmConfig, roles: Roles, start: ModelFacts) -> Callable[[Any], Awaitable[Any]] | None:
    """Adds the reference's log-probabilities to samples of a policy gradient; None for a run without a reference."""
    references = roles.references
    if references is None:
        return None
    grid = BlockGrid(config.rollout.block_size, config.rollout.block_grid)
    draws = Draws(config.rollout.temperature, never_drawn(start))

    async def complete(samples: Any) -> Any:
        (with_reference,), _ = await references.call(
            "use_student", add_reference, None, samples, grid, start.form, draws, outputs=1
        )
        return with_reference

    return complete


class OnPolicySource:
    """The student's own rollouts: decodes with the newest weights, then has a teacher or a reward make samples.

    Args:
        complete: makes a trajectory's sample.
        expect: called with an index before its response is decoded.
    """

    together = 1

    def __init__(
        self,
        config: OpdlmConfig,
        rollouts: ActorPool,
        records: RunRecords,
        complete: Callable[[Decoded], Awaitable[SampleRef]],
        order: PromptOrder,
        expect: Callable[[int], None] | None = None,
    ) -> None:
        self.config, self.complete, self.order, self.expect = config, complete, order, expect
        rollout = config.rollout
        # Requests that wait in an actor save a message, but then decide who decodes them before anybody is free. Where
        # a run must be repeated to the bit, each actor gets its share of a round in one message.
        ahead = (
            rollout.samples_per_round if config.run.deterministic else max(int(rollout.batch_size * _AHEAD_SHARE), 1)
        )
        settings = DecodeSettings.from_config(rollout, config.objective.kind, config.rollouts_bring_targets)
        self.dealer = Dealer(rollouts, records, settings, rollout.batch_size, ahead)

    async def room(self) -> int:
        """See `SampleSource`."""
        return await self.dealer.room()

    async def sample(self, indices: list[int], weights: WeightHandle) -> tuple[list[SampleRef], list[int]]:
        """See `SampleSource`."""
        (index,) = indices
        if self.expect is not None:
            self.expect(index)
        decoded = await self.dealer.decode(rollout_request(self.config, self.order, index), weights)
        return [await self.complete(decoded)], [decoded.weight_version]


def rollout_request(config: OpdlmConfig, order: PromptOrder, index: int) -> RolloutRequest:
    """The request for one sample: its prompt, the length limit and threshold of its round, and a seed of its own."""
    prompt, round_ = order[index], index // config.rollout.samples_per_round
    return RolloutRequest(
        index=index,
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.ids,
        max_new_tokens=length_limit(config, round_, prompt.domain, prompt.max_new_tokens),
        seed=sample_seed(config.run.seed, index),
        threshold=dynamic_threshold(config, round_),
    )


class GivenSource:
    """Given responses as trajectories that visited no states, so only `random_mask` makes states of them.

    Args:
        responses: `[R] int32` by prompt id; a response longer than the round's limit is cut at the limit.
        vocab_size: the teacher's rows up to its last token.
        eos_ids: tokens that end a response.
        mark_id: the token that ends the reasoning, where the objective weighs reasoning and answer.
    """

    def __init__(
        self,
        config: OpdlmConfig,
        scoring: Scoring,
        order: PromptOrder,
        responses: dict[str, np.ndarray],
        vocab_size: int,
        eos_ids: Sequence[int],
        mark_id: int | None = None,
    ) -> None:
        self.config, self.scoring, self.order, self.mark_id = config, scoring, order, mark_id
        self.responses, self.vocab_size, self.eos_ids = responses, vocab_size, tuple(eos_ids)
        self.grid = BlockGrid(config.rollout.block_size, config.rollout.block_grid)
        self.together = scoring.per_reference

    async def room(self) -> int:
        """See `SampleSource`. The queue's slots are the limit."""
        return self.config.rollout.samples_per_round

    async def sample(self, indices: list[int], weights: WeightHandle) -> tuple[list[SampleRef], list[int]]:
        """See `SampleSource`. Given responses are never stale: they count as made with the given weights."""
        trajectories = [self._trajectory(index, weights.version) for index in indices]
        if self.config.objective.kind != "cft":
            group = ray.put(trajectories)
            decoded = [Decoded(group, i, t.index, t.lengths, weights.version) for i, t in enumerate(trajectories)]
            samples = await asyncio.gather(*(self.scoring.score(one) for one in decoded))
            return samples, [weights.version] * len(indices)
        made, size = [ScoredTrajectory(t, self._one_hot(t)) for t in trajectories], self.scoring.per_reference
        groups = [ray.put(group) for group in in_groups(made, size)]
        return sample_refs(groups, size, [t.lengths for t in trajectories]), [weights.version] * len(indices)

    def _trajectory(self, index: int, version: int) -> Trajectory:
        prompt, round_ = self.order[index], index // self.config.rollout.samples_per_round
        limit = length_limit(self.config, round_, prompt.domain, prompt.max_new_tokens)
        response = self.responses[prompt.prompt_id]
        names = index, prompt.prompt_id
        trajectory = given_trajectory(*names, prompt.ids, response, limit, self.eos_ids, self.grid, version)
        return replace(trajectory, loss_weight=self._loss_weight(response, len(trajectory.response_ids)))

    def _loss_weight(self, response: np.ndarray, kept: int) -> np.ndarray | None:
        """`[kept] float32`, by the parts of the whole response; None where the objective weighs nothing."""
        weights = self.config.objective.weights
        if weights is None:
            return None
        marks = np.flatnonzero(response == self.mark_id)  # of a response that is cut, too
        is_reasoning = np.arange(kept) <= (marks[-1] if marks.size else -1)
        return np.where(is_reasoning, weights.reasoning, weights.answer).astype(np.float32)

    def _one_hot(self, trajectory: Trajectory) -> TopKTargets:
        # Cross-entropy on a token is the forward KL to the distribution that gives it probability 1: top-1 at log 1.
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
    """A given response as a trajectory whose last block is filled with what a decoder could have seen there.

    A finished response is filled up with its end-of-sequence token. A response that goes on after the limit shows its
    own next tokens, without a loss on them. A response that stops without an end-of-sequence token ends with its last
    whole block, so that the student sees no false end; if it is shorter than its first block, the block is filled up
    with end-of-sequence tokens that have no loss.

    Args:
        response: `[R] int32`; tokens after its first end-of-sequence token are left out.
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
        reveal_step=np.ones(kept, dtype=np.int32),
        response_length=length,
        weight_version=version,
        finish_reason="eos" if finished else "length",
        denoising_steps=0,
    )
