"""What travels between the actors: frozen records of numpy arrays (zero-copy in Ray's object store).

Shapes use P prompt tokens, R response tokens, R' >= R kept tokens (the response up to the end of its last block),
K top tokens, D hidden size, V vocabulary. Imports no torch: the queue's process and the driver stay light.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One prompt to decode."""

    index: int
    """Place in the run's order of prompts, from 0; identifies the sample from here on (the ledger counts by it)."""
    prompt_id: str
    """Name of the prompt in its data, for people."""
    prompt_ids: np.ndarray  # [P] int32
    max_new_tokens: int
    """Most response tokens; never exceeded."""
    seed: int
    """Seed of this sequence alone: the result does not depend on what it is decoded beside."""
    threshold: float | None = None
    """Dynamic threshold of the moment (curriculum). None: the decoder's own."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A decoded response and the order in which it was revealed (METHOD.md section 2).

    The kept tokens run to the end of the last block: what was decoded behind the end-of-sequence token was visible
    while the block was denoised, so training needs it to rebuild the state. The response itself is the first
    `response_length` of them.

    Example, S = 4, P = 4: `response_ids [7, 9, EOS, 5]`, `response_length 3`, `reveal_step [1, 2, 1, 3]`: step 1
    revealed 7 and EOS, step 2 revealed 9, and the 5 behind the end came last.
    """

    index: int
    prompt_id: str
    prompt_ids: np.ndarray  # [P] int32
    response_ids: np.ndarray  # [R'] int32
    reveal_step: np.ndarray  # [R'] int16, from 1, rising over the whole response
    response_length: int
    weight_version: int
    """That it was decoded with; the oldest, where new weights came meanwhile (`rollout.on_new_weights: continue`)."""
    finish_reason: FinishReason
    denoising_steps: int
    """Student forwards that revealed tokens of this sequence."""
    token_versions: np.ndarray | None = None
    """`[R'] int32`, the weight version that revealed each kept token. None: `weight_version`, all of them."""

    @property
    def response(self) -> np.ndarray:
        """The response's tokens, `[R] int32`: up to and with the first end-of-sequence token, or the limit."""
        return self.response_ids[: self.response_length]

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the prompt, and of the response."""
        return len(self.prompt_ids), self.response_length


@dataclass(frozen=True, slots=True)
class TopKTargets:
    """The teacher's K likeliest next tokens, log-softmax over the full vocabulary, not renormalised."""

    token_ids: np.ndarray  # [R, K] int32
    logprobs: np.ndarray  # [R, K] float32
    vocab_size: int
    """The teacher's V: what the student's softmax is over."""


@dataclass(frozen=True, slots=True)
class HiddenTargets:
    """The teacher's final hidden states; the learner applies the teacher's output matrix."""

    hidden: np.ndarray  # [R, D] float32, or uint16 that holds the bits of bfloat16


@dataclass(frozen=True, slots=True)
class LogitsTargets:
    """The teacher's logits over its full vocabulary (small vocabularies, tests)."""

    logits: np.ndarray  # [R, V] float32


TeacherTargets = TopKTargets | HiddenTargets | LogitsTargets


@dataclass(frozen=True, slots=True)
class ScoredTrajectory:
    """A trajectory with the teacher's next-token distributions after each clean prefix."""

    trajectory: Trajectory
    targets: TeacherTargets


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one parameter lies in its dtype's buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # numpy name; uint16 holds the bits of bfloat16
    start: int  # in elements


@dataclass(frozen=True, slots=True)
class WeightPack:
    """All parameters of a model under a version number."""

    version: int
    places: tuple[TensorPlace, ...]
    buffers: dict[str, np.ndarray] | dict[str, torch.Tensor]  # dtype name -> [elements]; tensors on their device
    checksum: int

    @property
    def nbytes(self) -> int:
        """Bytes that a push moves."""
        return sum(buffer.nbytes for buffer in self.buffers.values())


@dataclass(frozen=True, slots=True)
class WeightHandle:
    """A published weight version: a reference to a `WeightPack`, not the weights."""

    version: int
    pack: list[Any]
    """The one object reference, in a list, so that Ray does not fetch it on the way."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """What one call of the decoder did."""

    weight_version: int
    sequences: int
    response_tokens: int
    denoising_steps: int
    """Denoising steps summed over sequences."""
    forwards: int
    """Batched denoising forwards (prefills not counted)."""
    forward_tokens: int
    """Tokens that went through the student: prompt blocks, blocks being denoised, finished blocks committed."""
    seconds: float
    ended_by_eos: int = 0
    """Sequences that ended with an end-of-sequence token; the others ended at their length limit."""
    continued_sequences: int = 0
    """Sequences that were decoded with more than one weight version; `weight_version` is the oldest of all."""
    continued_tokens: int = 0
    """Their response tokens that came after a change of weights."""
    version_spread_max: int = 0
    """Most versions between the oldest and the newest token of one sequence."""
