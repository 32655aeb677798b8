"""Which weights a server has, and where that outlives its processes. Light: the keeper's process imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import ray

KEEPER = "weights"
"""Name of the keeper among the engines' deployment-scoped actors."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that a request is decoded with, or newer ones. An engine that has older ones thus gets these."""

    folder: str
    """A model folder, or a checkpoint of a run (`RUN/checkpoints/round-NNNNNN`)."""
    version: int
    """Counts what the server has loaded; its first weights are 0."""
    mark: str = ""
    """Differs where the folder has come to hold other weights; empty: not known."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """What one engine says when it is to take weights."""

    engine: str
    """Id of its replica."""
    version: int
    """Weight version in its model."""
    problem: str | None = None
    """Why it did not do what it was asked to; None: it did."""


class WeightsKeeper:
    """Remembers the newest weights of a server.

    Ray Serve runs it as long as the application: it outlives engines and the front, and a new application of the same
    name gets a new one. Should it die itself, the engines that live still say what they have.
    """

    def __init__(self) -> None:
        self._newest: Weights | None = None

    def keep(self, weights: Weights) -> None:
        """Remembers these weights, unless it knows newer ones."""
        if self._newest is None or weights.version > self._newest.version:
            self._newest = weights

    def newest(self) -> Weights | None:
        """The newest weights that an engine was to take; None: those that the server started with."""
        return self._newest


WeightsKeeperActor = ray.remote(WeightsKeeper)
