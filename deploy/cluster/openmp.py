"""How long OpenMP's threads keep their core busy while they wait; imported before torch, so it imports nothing."""

from __future__ import annotations

OPENMP_WAITS = {
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits for another one sleeps; by default it keeps the core busy
    "GOMP_SPINCOUNT": "20000",  # it waits a millisecond first: a forward has thousands of short waits
}
"""Environment variables of this command's process, and of those of a Ray that we start. The user's own values win."""
