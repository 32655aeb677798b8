"""Rollout actor: a student replica on its own device that decodes prompts to trajectories.

It serves nothing before it holds the weight version that a call names: each call carries the handle, so an actor that
died and came back fetches the current version by itself.

With `rollout.on_new_weights: finish` it does one call at a time, so a push waits behind what is being decoded. With
`continue` it has a second thread, which takes a push in meanwhile; the thread that decodes puts it into the model
between two denoising steps. Only one thread at a time has the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.exceptions import ObjectLostError

from opdlm.actors.engine_guard import guarded, one_token_forward
from opdlm.actors.rollout.cuda_graphs import CudaGraphs
from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.config.schema import OnNewWeights
from opdlm.common.errors import WeightsLost, last_line
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.load import load_model
from opdlm.common.types import DecodeStats, RolloutRequest, Trajectory, WeightHandle, WeightPack
from opdlm.common.weights import load_weights


class RolloutActor:
    """A student and one decoder per way of decoding."""

    def __init__(
        self,
        student: str,
        dtype: str,
        threads: int,
        on_new_weights: OnNewWeights = "finish",
        cuda_graphs: bool = False,
    ) -> None:
        torch.set_num_threads(max(threads, 1))
        facts = read_facts(student)
        self._mask_id, self._eos_ids = require_mask(facts), facts.eos_ids
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_model(student, dtype).to(device)
        self._recorder = CudaGraphs if cuda_graphs else None
        self._version = -1  # the start weights are pushed like any others, so that a broken path shows at once
        self._decoders: dict[tuple[DecodeSettings, int], BlockDecoder] = {}
        self._continues = on_new_weights == "continue"
        self._has_model = threading.Lock()
        self._mailbox = threading.Lock()
        self._arrived: tuple[int, WeightPack] | None = None
        """Newest version that came and is not in the model yet."""

    def ready(self) -> None:
        """Returns once the student is loaded."""

    def forget_weights(self) -> None:
        """The run goes back to a checkpoint: versions newer than that one are of no use any more."""
        with self._has_model, self._mailbox:
            self._version, self._arrived = -1, None

    def load_weights(self, handle: WeightHandle) -> float:
        """Takes a published version; returns the seconds it took. A version never goes backwards.

        While a sequence is being decoded (`continue`) the weights are fetched now; what is decoded after the next
        denoising step is decoded with them.
        """
        started = time.perf_counter()
        self._receive(handle)
        if self._has_model.acquire(blocking=not self._continues):
            try:
                with guarded("student", self._probe):
                    self._renew()
            finally:
                self._has_model.release()
        return time.perf_counter() - started

    def decode(
        self, requests: Sequence[RolloutRequest], handle: WeightHandle | None, settings: DecodeSettings, batch_size: int
    ) -> tuple[list[Trajectory], DecodeStats]:
        """Decodes with that version (or a newer one that is here). Trajectories in the order of the requests.

        No handle: with the weights of its own folder, as version 0 (evaluation of a checkpoint).

        Raises:
            ValueError: no handle, but published weights were loaded over the folder's.
        """
        with self._has_model, guarded("student", self._probe):
            if handle is not None:
                self._receive(handle)
            self._renew()
            if handle is None and self._version >= 0:
                raise ValueError(f"the folder's own weights are gone: version {self._version} was loaded over them")
            key = (settings, batch_size)
            if key not in self._decoders:
                how = (settings, self._mask_id, self._eos_ids, batch_size, self._recorder)
                self._decoders[key] = BlockDecoder(self._model, *how)
            renew = self._renew if self._continues and handle is not None else None
            return self._decoders[key].decode(requests, max(self._version, 0), renew=renew)

    def _probe(self) -> None:
        one_token_forward(self._model)

    def _receive(self, handle: WeightHandle) -> None:
        """Fetches a version, unless as new a one came before."""
        with self._mailbox:
            if handle.version <= self._newest():
                return
        pack = _fetch(handle)  # outside: the decoding thread looks into the mailbox at every step
        with self._mailbox:
            if handle.version > self._newest():
                self._arrived = handle.version, pack

    def _newest(self) -> int:
        return self._version if self._arrived is None else self._arrived[0]

    def _renew(self) -> int | None:
        """Puts what arrived into the model; its version, None where nothing did. For who has the model only."""
        with self._mailbox:
            arrived = self._arrived
        if arrived is None:
            return None
        self._version = -1  # until all of it is loaded and checked
        load_weights(self._model, arrived[1])
        with self._mailbox:
            self._version = arrived[0]
            if self._arrived is arrived:  # it stays where loading failed: the next call must not do with older ones
                self._arrived = None
        return self._version


def _fetch(handle: WeightHandle) -> WeightPack:
    try:
        return ray.get(handle.pack[0])
    except ObjectLostError as error:
        raise WeightsLost(f"weights of version {handle.version}: {last_line(error)}") from error


def start_rollout_actor(
    name: str,
    student: str,
    dtype: str,
    cpus: float,
    gpus: float,
    restarts: int,
    on_new_weights: OnNewWeights = "finish",
    cuda_graphs: bool = False,
    **where: Any,
) -> Any:
    """Starts one under its name; it may die `restarts` times. The pool repeats the call that died with it.

    `where`: more options of Ray's, for its place.
    """
    actor = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=restarts,
        max_concurrency=2 if on_new_weights == "continue" else 1,  # a decode, and a push that comes meanwhile
    )(RolloutActor)
    return actor.options(name=name, **where).remote(student, dtype, int(cpus), on_new_weights, cuda_graphs)
