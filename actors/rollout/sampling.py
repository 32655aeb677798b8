"""Draws candidate tokens for masked positions, with random numbers that depend on the sequence alone.

Every uniform number is a hash of (sequence seed, position, denoising step). So there is no generator state and no
Python loop over sequences, and a sequence decodes to the same tokens in any batch and on any actor.
"""

from __future__ import annotations

import numpy as np
import torch

from opdlm.common.seeds import as_int64

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the increment of splitmix64
_MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB
_LOW_TEMPERATURE = 1e-3
LOWEST_TEMPERATURE = 1e-30
"""Temperatures below it count as it; it is not 0, so that one can divide by it."""


def hashed_uniform(seed: torch.Tensor, *counters: torch.Tensor | int) -> torch.Tensor:
    """Uniform numbers in [0, 1) from splitmix64 of the seed and the counters.

    Args:
        seed: int64.
        counters: int64 tensors that broadcast with `seed`, or ints.

    Returns: float64 in the broadcast shape; equal inputs give equal numbers on every device.
    """
    state = _mix(seed + _GOLDEN)
    for counter in counters:
        # An int stays an int: copying it to a GPU as a tensor would wait for all work queued there.
        step = as_int64((counter + 1) * _GOLDEN) if isinstance(counter, int) else (counter + 1) * _GOLDEN
        state = _mix(state + step)
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Sets the logits of tokens that top-k and then top-p leave out to minus infinity; `[..., V]` float, same shape.

    The likeliest token always stays. Top-p keeps the smallest set of tokens whose mass reaches `top_p`.
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
    logits: torch.Tensor, uniform: torch.Tensor | None, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Draws one candidate token per position, by inverting the cumulative distribution.

    Where a position's logits are finite or minus infinity, and not all of them minus infinity, a token with a logit of
    minus infinity is never drawn.

    Args:
        logits: `[..., V]` float32; minus infinity for tokens that are never a candidate (the mask token).
        uniform: `[...]` float64 in [0, 1); None at temperature 0, which needs no random numbers.
        temperature: 0 takes the likeliest token.

    Returns: `[...]` int64.
    """
    if uniform is None or temperature == 0.0:
        return _likeliest(logits)
    return draw(distribution(logits, temperature, top_k, top_p), uniform)


def distribution(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """The probabilities that candidates are drawn with: `[..., V]` float32, of logits as for `draw_candidates`.

    Args:
        temperature: above 0.
    """
    if temperature < _LOW_TEMPERATURE:  # dividing by so small a number could overflow, or be a division by 0
        logits, temperature = logits - logits.amax(dim=-1, keepdim=True), max(temperature, LOWEST_TEMPERATURE)
    return filter_logits(logits / temperature, top_k, top_p).softmax(dim=-1)


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draws a token by inverting the cumulative distribution: `[..., V]`, `[...]` float64 in [0, 1) -> `[...]` int64.

    The probabilities need not add up to 1. A token of probability 0 is never drawn.
    """
    # float64: in float32 the sum over 150k tokens rounds away the unlikely ones.
    cumulative = probabilities.to(torch.float64).cumsum(dim=-1)
    total = cumulative[..., -1:]
    # Below the total even where the product rounds up to it: behind the total are only tokens of probability 0.
    point = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the highest logits (NaN counts as highest): `[..., V]` -> `[...]` int64."""
    if logits.device.type == "cpu":  # ten times faster than torch's, which takes longer than a softmax
        return torch.from_numpy(np.asarray(logits.detach().numpy().argmax(axis=-1)))
    return logits.argmax(dim=-1)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's `>>` is arithmetic: it keeps the sign of an int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)
