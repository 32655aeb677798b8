"""A second copy of the newest weights, on another node than the first, for the case that this node dies.

A pack lies on the node of the learner's first rank. If that node dies, samples and rollout actors may die with it, and
the samples are made again with these weights. The copy is kept where it helps and where there is room:

    the learner's first rank is on    second copy
    the driver's node                 none: the death of that node ends the run
    another node                      on the node with the largest object store, of all but the rank's own; where that
                                      has no room for two versions, there is none, and the log says so

That is usually a node of rollout actors, which fetch the pack anyway; the driver's node may be small.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from opdlm.common.errors import first_line
from opdlm.common.weight_offer import WeightOffer

log = logging.getLogger("opdlm.queue")

VERSIONS = 2
"""Versions that a copy's node holds at a time: the old one is let go when the new one is there."""


class _Holder:
    """An actor. While it refers to a pack, Ray keeps the pack in the object store of its node."""

    def __init__(self) -> None:
        self._pack: Any = None

    def hold(self, pack: list[Any]) -> None:
        """Fetches a pack and holds it in place of the one before. `pack`: a list of the one reference to it."""
        self._pack = ray.get(pack[0])


class SecondCopy:
    """Keeps the copy. Each method is a coroutine of the queue actor's event loop."""

    def __init__(self) -> None:
        self._holder: Any = None
        self._node: str | None = None
        """Of the holder; None where there is none."""

    async def keep(self, offer: WeightOffer, pack: Any) -> None:
        """Copies the offered pack to another node, where one is needed; returns when it is there.

        Args:
            pack: the reference to it.
        """
        if offer.node == ray.get_runtime_context().get_node_id():
            self._let_go()
            return
        node = node_for_copy(ray.nodes(), offer, self._node)
        if node is None:
            self._let_go(
                offer.version, f"no other node's object store has room for {VERSIONS} x {offer.nbytes:,} bytes"
            )
            return
        if node != self._node:
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            self._holder = ray.remote(num_cpus=0)(_Holder).options(scheduling_strategy=where).remote()
            self._node = node
        holder = self._holder
        try:
            await holder.hold.remote([pack])
        except RayError as error:  # the next version gets another holder, or has it already
            if self._holder is holder:
                self._let_go(offer.version, first_line(error))

    def _let_go(self, version: int = 0, reason: str | None = None) -> None:
        """Ends the holder, if there is one. `reason`: why a version has no copy that should have one."""
        self._holder = self._node = None
        if reason is not None:
            log.warning("weights of version %d have no second copy: %s", version, reason)


def node_for_copy(nodes: Sequence[Mapping[str, Any]], offer: WeightOffer, present: str | None) -> str | None:
    """Id of the node that should hold the copy, as `ray.nodes()` names them; None where no node has room.

    Args:
        present: the node that holds the copy of the version before; it stays while it is alive.
    """
    stores = {
        node["NodeID"]: node["Resources"].get("object_store_memory", 0.0)
        for node in nodes
        if node["Alive"] and node["NodeID"] != offer.node
    }
    fitting = {node: size for node, size in stores.items() if size >= VERSIONS * offer.nbytes}
    return present if present in fitting else max(fitting, key=lambda node: (fitting[node], node), default=None)
