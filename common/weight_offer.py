"""A weight pack that a learner rank offers, and that the replay queue fetches from the rank's process.

Ray ties an object to the process that owns it. What a rank puts into the object store itself belongs to the rank, and
Ray frees it when the rank dies, which may be before every rollout actor has loaded it. `ray.put(..., _owner=)`, which
named another owner, was removed in Ray 2.56. What an actor *returns*, however, belongs to its caller. So the rank only
offers the pack, and the queue calls the rank's process, which returns it: the pack is stored on the rank's node, the
queue owns it, and rollout actors read it from there. The queue also has another node hold a copy, in case the rank's
node dies (`actors/queue/second_copy.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opdlm.common.types import WeightPack

_offered_packs: dict[int, WeightPack] = {}
"""The packs that this process offers at the moment, by version."""


@dataclass(frozen=True, slots=True)
class WeightOffer:
    """Says which actor's process offers a pack, and which one. It holds no weights and is cheap to send."""

    actor: Any
    """Handle of the actor in whose process the pack is. The actor's main thread must be free to answer a call, as that
    of a Ray Train worker is, which trains in another thread."""
    node: str
    """Ray's id of the node of that process."""
    version: int
    nbytes: int

    def collect(self) -> tuple[Any, Any]:
        """Has the actor return the pack into the object store; the calling process owns it.

        Returns: references to the `WeightPack`, and to None. The second is ready once the pack is stored, and raises
        the error that kept the pack out of the object store; waiting for it fetches no weights.
        """
        pack, stored = self.actor.__ray_call__.options(num_returns=2).remote(_return_pack, self.version)
        return pack, stored


@contextmanager
def offered(actor: Any, node: str, pack: WeightPack) -> Iterator[WeightOffer]:
    """Offers a pack until the block ends.

    Args:
        actor: handle of the actor in whose process this runs.
        node: Ray's id of its node.
    """
    _offered_packs[pack.version] = pack
    try:
        yield WeightOffer(actor, node, pack.version, pack.nbytes)
    finally:
        del _offered_packs[pack.version]


def _return_pack(_: Any, version: int) -> tuple[WeightPack, None]:
    return _offered_packs[version], None
