"""Rollout actor: a student replica on its own device that decodes prompts to trajectories.

It serves nothing before it holds the weight version that a call names: each call carries the handle, so an actor that
died and came back fetches the current version by itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
import torch

from actors.block_decoder import BlockDecoder
from actors.decode_settings import DecodeSettings
from common.models import load_model, read_facts, require_mask
from common.types import DecodeStats, RolloutRequest, Trajectory, WeightHandle
from common.weights import load_weights


class RolloutActor:
    """A student and one decoder per way of decoding."""

    def __init__(self, student: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(max(threads, 1))
        facts = read_facts(student)
        self._mask_id, self._eos_ids = require_mask(facts), facts.eos_ids
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_model(student, dtype).to(device)
        self._version = -1  # the start weights are pushed like any others, so that a broken path shows at once
        self._decoders: dict[tuple[DecodeSettings, int], BlockDecoder] = {}

    def load_weights(self, handle: WeightHandle) -> float:
        """Takes a published version; returns the seconds it took. A version never goes backwards."""
        started = time.perf_counter()
        if handle.version <= self._version:
            return 0.0
        self._version = -1  # until all of it is loaded and checked
        load_weights(self._model, ray.get(handle.pack[0]))
        self._version = handle.version
        return time.perf_counter() - started

    def decode(
        self, requests: Sequence[RolloutRequest], handle: WeightHandle | None, settings: DecodeSettings, batch_size: int
    ) -> tuple[Trajectory | DecodeStats, ...]:
        """Decodes with that version (or a newer one that is here). One return value a request, then the statistics.

        No handle: with the weights of its own folder, as version 0 (evaluation of a checkpoint).

        Raises:
            ValueError: no handle, but published weights were loaded over the folder's.
        """
        if handle is not None:
            self.load_weights(handle)
        elif self._version >= 0:
            raise ValueError(f"the folder's own weights are gone: version {self._version} was loaded over them")
        key = (settings, batch_size)
        if key not in self._decoders:
            self._decoders[key] = BlockDecoder(self._model, settings, self._mask_id, self._eos_ids, batch_size)
        trajectories, stats = self._decoders[key].decode(requests, max(self._version, 0))
        return (*trajectories, stats)


def start_rollout_actor(name: str, student: str, dtype: str, cpus: float, gpus: float, restarts: int) -> Any:
    """Starts one under its name; it may die `restarts` times, and Ray repeats the call that died with it."""
    actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=restarts, max_task_retries=restarts)(RolloutActor)
    return actor.options(name=name).remote(student, dtype, int(cpus))
