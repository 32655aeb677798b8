"""Seeds of single samples. A run's seed may have any 64 bits, so what is made of it wraps around in 64 bits."""

from __future__ import annotations


def sample_seed(run_seed: int, number: int) -> int:
    """The seed of a run's sample, or of another numbered part of it: 0 to 2^64 - 1, another one for each number."""
    return wrapped(run_seed * 1_000_003 + number)


def wrapped(seed: int) -> int:
    """The seed's lowest 64 bits, 0 to 2^64 - 1, as torch takes them."""
    return seed % 2**64


def as_int64(number: int) -> int:
    """The number wrapped around into int64's range, as arithmetic on int64 tensors wraps."""
    return (number + 2**63) % 2**64 - 2**63
