"""Drawing candidate tokens for masked positions, with randomness that belongs to the sequence.

Every uniform number is a hash of (sequence seed, position, denoising step): no generator state, no Python loop over
sequences, and a sequence decodes to the same tokens whatever it shares its batch with and on whichever actor.
"""

from __future__ import annotations

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the increment of splitmix64
_MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB


def hashed_uniform(seed: torch.Tensor, *counters: torch.Tensor | int) -> torch.Tensor:
    """Uniform numbers in [0, 1) from splitmix64 of the seed and the counters.

    Args:
        seed: int64; counters: int64 tensors that broadcast with it, or ints.

    Returns: float64 of the broadcast shape; equal inputs give equal numbers on every device.
    """
    state = _mix(seed + _GOLDEN)
    for counter in counters:
        # Not as a tensor where it is a number: putting that onto a GPU waits for all that the GPU has to do.
        step = _as_int64((counter + 1) * _GOLDEN) if isinstance(counter, int) else (counter + 1) * _GOLDEN
        state = _mix(state + step)
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Sets what top-k and then top-p leave out to minus infinity. `[..., V]` float -> the same shape.

    The likeliest token always stays; top-p keeps the smallest set whose mass reaches `top_p`.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        mass_before[..., 0] = 0.0
        beyond = mass_before >= top_p
        beyond[..., 0] = False
        dropped = torch.zeros_like(beyond).scatter(-1, order, beyond)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


def draw_candidates(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """One candidate token a position, by inverting the cumulative distribution.

    Args:
        logits: `[..., V]` float32; minus infinity where never a candidate (the mask token).
        uniform: `[...]` float64 in [0, 1).
        temperature: 0 takes the likeliest token.

    Returns: `[...]` int64.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = filter_logits(logits / temperature, top_k, top_p).softmax(dim=-1)
    # float64: in float32 the sum over 150k tokens rounds away the unlikely ones.
    cumulative = probabilities.to(torch.float64).cumsum(dim=-1)
    point = uniform[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _as_int64(number: int) -> int:
    """Wraps around, as int64 tensors do."""
    return (number + 2**63) % 2**64 - 2**63


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's own keeps the sign of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)
