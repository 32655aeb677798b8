"""What the actors send to each other: frozen records of numpy arrays, which Ray's object store shares without a copy.

In shapes, P is the number of prompt tokens, R of response tokens, R' >= R of kept tokens (the response up to the end of
its last block), K of top tokens, D the hidden size and V the vocabulary size. The module does not import torch, so the
processes of the queue and of the driver stay small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

FinishReason = Literal["eos", "length", "stop"]
"""Why a response ended: with an end-of-sequence token, at its length limit, or with the block of a stop string."""


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One prompt to decode."""

    index: int
    """Place in the run's order of prompts, from 0. It identifies the sample everywhere, also in the queue's ledger."""
    prompt_id: str
    """Name of the prompt's row in the data, such as `prompts.jsonl:7`, for messages and files."""
    prompt_ids: np.ndarray  # [P] int32
    max_new_tokens: int
    """Longest response in tokens; it is never exceeded."""
    seed: int
    """Seed of this sequence alone, so that its tokens do not depend on the other sequences of its batch. Any integer;
    the decoder takes its lowest 64 bits."""
    threshold: float | None = None
    """Confidence threshold of the round (`curriculum.threshold`). None: the threshold of the decoder's settings."""
    stop: tuple[str, ...] = ()
    """The sequence ends with the block in which its text first holds one of these, where the decoder has `stops`."""
    sampling: tuple[float, float] | None = None
    """Temperature and top-p of this sequence. None: those of the decoder's settings, which `verified` always takes."""
    watched: bool = False
    """Whether somebody watches its denoising steps (`StepWatch` in `actors/rollout/observation.py`)."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A decoded response and the order in which its tokens were revealed (METHOD.md section 2).

    The kept tokens go on to the end of the last block. Tokens after the end-of-sequence token were visible while the
    block was denoised, so training needs them to rebuild the block's states. The response itself is the first
    `response_length` kept tokens.

    Example with S = 4 and P = 4: `response_ids [7, 9, EOS, 5]`, `response_length 3`, `reveal_step [1, 2, 1, 3]`. Step 1
    revealed 7 and EOS, step 2 revealed 9, and step 3 revealed 5, which comes after the end of the response.
    """

    index: int
    prompt_id: str
    prompt_ids: np.ndarray  # [P] int32
    response_ids: np.ndarray  # [R'] int32
    reveal_step: np.ndarray  # [R'] int32, counted from 1 over the whole response, not anew in each block
    response_length: int
    weight_version: int
    """Weight version that decoded it. If weights changed meanwhile (`rollout.on_new_weights: continue`), the oldest."""
    finish_reason: FinishReason
    denoising_steps: int
    """Student forwards that revealed tokens of this sequence."""
    token_versions: np.ndarray | None = None
    """`[R'] int32`, the weight version that revealed each kept token. None: `weight_version` revealed all of them."""
    loss_weight: np.ndarray | None = None
    """`[R'] float32`, how much the loss at each kept token counts. None: all count the same."""
    reveal_logprob: np.ndarray | None = None
    """`[R'] float32`, log-probability of each kept token in the distribution it was drawn from. None: not asked for."""
    clean_hidden: np.ndarray | None = None
    """`[R, D]`, as in `HiddenTargets`: the hidden states of the clean path that predicted each token of the response,
    which the strategy `verified` computes anyway. None: not asked for."""

    @property
    def response(self) -> np.ndarray:
        """The tokens of the response, `[R] int32`: to the first end-of-sequence token inclusive, or to the limit."""
        return self.response_ids[: self.response_length]

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of tokens of the prompt, and of the response."""
        return len(self.prompt_ids), self.response_length


@dataclass(frozen=True, slots=True)
class TopKTargets:
    """The teacher's K likeliest next tokens, log-softmax over the full vocabulary, not renormalised."""

    token_ids: np.ndarray  # [R, K] int32
    logprobs: np.ndarray  # [R, K] float32
    vocab_size: int
    """The teacher's rows up to its last token. The student's softmax is over the same tokens."""


@dataclass(frozen=True, slots=True)
class HiddenTargets:
    """The teacher's final hidden states; the learner applies the teacher's output matrix."""

    hidden: np.ndarray  # [R, D] float32, or uint16 that holds the bits of bfloat16


@dataclass(frozen=True, slots=True)
class LogitsTargets:
    """The teacher's logits over its full vocabulary, for small vocabularies and tests.

    V ends with the last token: rows of padding are left out. A row before it that no token has is minus infinity.
    """

    logits: np.ndarray  # [R, V] float32


@dataclass(frozen=True, slots=True)
class PolicyTargets:
    """What the policy gradient has instead of a teacher's distributions (METHOD.md section 7)."""

    advantage: float | None
    """Of the whole response, from the rewards of its group. None: these are all equal, so the group is left out."""
    reference_logprobs: np.ndarray | None = None
    """`[R] float32`, log-probabilities of the response's tokens under the reference model, in the states in which they
    were revealed. None: no distance from a reference is asked for."""
    teacher: TeacherTargets | None = None
    """The teacher's distributions, with `objective.opd_weight`."""


TeacherTargets = TopKTargets | HiddenTargets | LogitsTargets


@dataclass(frozen=True, slots=True)
class ScoredTrajectory:
    """A trajectory, and what it is trained towards.

    The teacher's target of a token is its next-token distribution after the clean tokens before it.
    """

    trajectory: Trajectory
    targets: TeacherTargets | PolicyTargets


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where the values of one parameter are in the buffer of its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # numpy's name; uint16 holds the bits of bfloat16
    start: int  # index of the first element


@dataclass(frozen=True, slots=True)
class WeightPack:
    """All parameters of a model, as one weight version."""

    version: int
    places: tuple[TensorPlace, ...]
    buffers: dict[str, np.ndarray] | dict[str, torch.Tensor]  # by dtype, [elements]; tensors: on the device
    checksum: int

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, which each push moves."""
        return sum(buffer.nbytes for buffer in self.buffers.values())


@dataclass(frozen=True, slots=True)
class WeightHandle:
    """A published weight version: a reference to its `WeightPack`, without the weights themselves."""

    version: int
    pack: list[Any]
    """A list of one object reference. Inside a list, Ray passes the reference on without fetching the pack."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """Counts of one call of the decoder."""

    weight_version: int
    sequences: int
    response_tokens: int
    denoising_steps: int
    """Denoising steps, summed over the sequences."""
    forwards: int
    """Batched forwards of denoising steps; prefills are not counted."""
    forward_tokens: int
    """Tokens that went through the student: blocks of prompts, blocks being denoised, and finished blocks whose keys
    and values were computed."""
    seconds: float
    ended_by_eos: int = 0
    """Sequences that ended with an end-of-sequence token. The others ended at their length limit."""
    continued_sequences: int = 0
    """Sequences that were decoded with more than one weight version; `weight_version` is then the oldest of all."""
    continued_tokens: int = 0
    """Response tokens of these sequences that were revealed after a change of weights."""
    version_spread_max: int = 0
    """Largest difference between the weight versions of two tokens of one sequence."""
    weight_versions: tuple[int, ...] = ()
    """Oldest weight version that decoded each sequence, in the order of the requests."""
    slot_steps: int = 0
    """Slots times denoising steps of a continuous decoder; 0 for any other."""
    occupied_slot_steps: int = 0
    """Those of them in which the slot had a sequence."""
    waiting_requests: int = 0
    """Requests that waited in the actor for a slot when it reported."""
    put_back: int = 0
    """Sequences that were put back, to be decoded again, because the cache was full."""
    cache_positions: int = 0
    """Positions that the actor's cache had when it reported."""
    cache_live_positions: int = 0
    """Those of them that sequences had filled."""
    steps_by_tokens: tuple[int, ...] = ()
    """With `verified`, how many steps of ended sequences wrote 1, 2, ... S tokens of the response; else empty."""

    @classmethod
    def of(
        cls, trajectories: Sequence[Trajectory], version: int, forwards: int, forward_tokens: int, seconds: float
    ) -> DecodeStats:
        """Counts over the trajectories of a call. `version`: the weight version where there is no trajectory."""
        continued = [(t, t.token_versions) for t in trajectories if t.token_versions is not None]
        return cls(
            weight_version=min((t.weight_version for t in trajectories), default=version),
            sequences=len(trajectories),
            response_tokens=sum(t.response_length for t in trajectories),
            denoising_steps=sum(t.denoising_steps for t in trajectories),
            forwards=forwards,
            forward_tokens=forward_tokens,
            seconds=seconds,
            ended_by_eos=sum(t.finish_reason == "eos" for t in trajectories),
            continued_sequences=len(continued),
            continued_tokens=sum(int((v[: t.response_length] > t.weight_version).sum()) for t, v in continued),
            version_spread_max=max((int(v.max()) - t.weight_version for t, v in continued), default=0),
            weight_versions=tuple(t.weight_version for t in trajectories),
        )


@dataclass(frozen=True, slots=True)
class EndedSequence:
    """A trajectory that has ended, without its tokens."""

    index: int
    lengths: tuple[int, int]
    """Prompt tokens, response tokens."""
    weight_version: int
    lane: int
    """Number of the slot that it occupied, as seen from outside: the lowest that was free when it began."""
    began: float
    ended: float
    """Seconds before the report."""


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What has happened in a stream since its last report."""

    ended: tuple[EndedSequence, ...]
    """In the order of the trajectories that come with the report."""
    room: int
    """Number of further requests that the actor would take; negative if it has too many."""
    added: int
    """Number of requests that the stream had taken when it made the report."""
    tokens_so_far: int
    """Response tokens of the sequences that are still being decoded."""
    stats: DecodeStats
