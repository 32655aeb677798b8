"""Weights that a rank of the learner lays out, and the replay queue comes for.

Ray ties an object to the process that called for it: what a rank puts into the object store by itself dies with the
rank, which may end before every rollout actor has loaded it. What an actor *returns* belongs to its caller. So the
rank lays the pack out and says where, and the queue calls: the pack goes into the object store of the rank's node, and
from there straight to whoever loads it; the queue takes a copy beside them, in case that node dies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opdlm.common.types import WeightPack

_laid_out: dict[int, WeightPack] = {}
"""Of this process, by version."""


@dataclass(frozen=True, slots=True)
class WeightOffer:
    """Where a pack is laid out."""

    actor: Any
    """Handle of the actor in whose process it is. Its own thread must be free (Ray Train's trains in another one)."""
    version: int
    nbytes: int

    def collect(self) -> tuple[Any, Any]:
        """References to the pack, for whoever calls, and to nothing; who has the second knows that the first is stored.

        The second raises what kept the pack out of the object store.
        """
        pack, stored = self.actor.__ray_call__.options(num_returns=2).remote(_hand_over, self.version)
        return pack, stored


@contextmanager
def offered(actor: Any, pack: WeightPack) -> Iterator[WeightOffer]:
    """Lays a pack out in this process, which is that actor's, until the block ends."""
    _laid_out[pack.version] = pack
    try:
        yield WeightOffer(actor, pack.version, pack.nbytes)
    finally:
        del _laid_out[pack.version]


def _hand_over(_: Any, version: int) -> tuple[WeightPack, None]:
    return _laid_out[version], None
