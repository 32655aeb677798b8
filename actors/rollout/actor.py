"""Rollout actor: a student replica on its own device that decodes prompts to trajectories.

A call names the weight version to decode with and carries its handle, and the actor decodes nothing before it holds
that version. So an actor that died and was restarted fetches the current version by itself.

With `rollout.on_new_weights: finish` the actor runs one call at a time, so a weight push waits for the decoding call
before it. With `continue` the actor has a second thread, which receives a push during decoding; the decoding thread
loads the received weights into the model between two denoising steps. One thread at a time uses the model.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import ObjectLostError
from safetensors import SafetensorError

from opdlm.actors.engine_guard import guarded, one_token_forward
from opdlm.actors.progress import Teller, Watch
from opdlm.actors.rollout.cuda_graphs import CudaGraphs
from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.config.schema import OnNewWeights
from opdlm.common.errors import OpdlmError, WeightsLost, first_line, last_line
from opdlm.common.model.device import device_for
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.folder import save_student
from opdlm.common.model.load import load_model
from opdlm.common.types import DecodeStats, RolloutRequest, Trajectory, WeightHandle, WeightPack
from opdlm.common.weights import load_weights


class RolloutActor:
    """A student, and a decoder for each pair of settings and batch size that it was called with. All share a cache."""

    def __init__(
        self,
        student: str,
        dtype: str,
        threads: int,
        on_new_weights: OnNewWeights = "finish",
        cuda_graphs: bool = False,
        cache_tokens: int | None = None,
        gpus: float = 0,
        gpu_setting: str = "rollout.gpus_per_actor",
    ) -> None:
        device = device_for(gpus, gpu_setting)
        torch.set_num_threads(max(threads, 1))
        self._folder, facts = student, read_facts(student)
        self._mask_id, self._facts = require_mask(facts), facts
        self._model = load_model(student, dtype).to(device)
        self._make_recorder = CudaGraphs if cuda_graphs else None
        self._cache = SlotCache(self._model, cache_tokens)
        self._version = -1
        """Weight version in the model; -1: none. Start weights are pushed too, so that a broken path shows at once."""
        self._decoders: dict[tuple[DecodeSettings, int], BlockDecoder] = {}
        self._continues = on_new_weights == "continue"
        self._model_lock = threading.Lock()
        """Held by the thread that uses the model."""
        self._arrived_lock = threading.Lock()
        """Held while a thread reads or replaces `_arrived`; never during a fetch or a forward."""
        self._arrived: tuple[int, WeightPack] | None = None
        """The newest version that was fetched and is not in the model yet."""

    def ready(self) -> None:
        """Returns once the student is loaded."""

    def forget_weights(self) -> None:
        """Drops all weights, because the run goes back to a checkpoint and newer versions are no longer valid."""
        with self._model_lock, self._arrived_lock:
            self._version, self._arrived = -1, None

    def load_weights(self, handle: WeightHandle) -> float:
        """Loads a published version into the model; returns the seconds it took. An older version changes nothing.

        If the other thread is decoding (`continue`), this call only fetches the weights. The decoding thread loads them
        before its next denoising step.

        Raises:
            WeightsLost: the published data is gone.
        """
        started = time.perf_counter()
        self._receive(handle)
        if self._model_lock.acquire(blocking=not self._continues):
            try:
                with guarded("student", self._probe):
                    self._load_arrived()
            finally:
                self._model_lock.release()
        return time.perf_counter() - started

    def decode(
        self,
        requests: Sequence[RolloutRequest],
        handle: WeightHandle | None,
        settings: DecodeSettings,
        batch_size: int,
        watch: Watch | None = None,
    ) -> tuple[list[Trajectory], DecodeStats]:
        """Decodes with the given version, or with a newer one if the actor has it. See `BlockDecoder.decode`.

        Args:
            handle: the weight version; None decodes with the weights of the student's folder, as version 0 (to evaluate
                a checkpoint).
            batch_size: number of slots.
            watch: is told how far the call has come.

        Returns: the trajectories in the order of the requests, and the statistics.

        Raises:
            OpdlmError: the student's logits are not finite.
            ValueError: no handle was given, but published weights have replaced those of the folder; or a request that
                the decoder refuses.
            WeightsLost: the published data is gone.
        """
        with self._model_lock, guarded("student", self._probe):
            if handle is not None:
                self._receive(handle)
            self._load_arrived()
            if handle is None and self._version >= 0:
                raise ValueError(f"decode without a handle: version {self._version} has replaced the folder's weights")
            key = (settings, batch_size)
            if key not in self._decoders:
                self._decoders[key] = BlockDecoder(
                    self._model,
                    settings,
                    self._mask_id,
                    self._facts.eos_ids,
                    batch_size,
                    self._make_recorder,
                    self._facts.tokens,
                    self._facts.form,
                    self._cache,
                )
            decoder, tell = self._decoders[key], Teller(watch)
            takes_weights = self._continues and handle is not None

            def before_step() -> int | None:
                tell(decoder.progress)
                return self._load_arrived() if takes_weights else None

            return decoder.decode(requests, max(self._version, 0), update_weights=before_step)

    def use_student(self, compute: Callable[..., Any], handle: WeightHandle | None, *arguments: Any) -> Any:
        """Computes something with the student besides decoding: `compute(model, mask_id, *arguments)`.

        Args:
            compute: a function of a module; it changes no weights.
            handle: as for `decode`.

        Raises:
            WeightsLost: the published data is gone.
        """
        with self._model_lock, guarded("student", self._probe):
            if handle is not None:
                self._receive(handle)
            self._load_arrived()
            return compute(self._model, self._mask_id, *arguments)

    def save_student(self, handle: WeightHandle, destination: Path, block_size: int, block_grid: str) -> None:
        """Writes the student of exactly this weight version as a model folder, in place of an earlier one there.

        Raises:
            OpdlmError: the disk did not take it.
            ValueError: the actor has newer weights.
            WeightsLost: the published data is gone.
        """
        with self._model_lock, guarded("student", self._probe):
            self._receive(handle)
            self._load_arrived()
            if self._version != handle.version:
                raise ValueError(f"saving version {handle.version}: the actor has version {self._version}")
            try:
                shutil.rmtree(destination, ignore_errors=True)
                save_student(self._model, self._folder, destination, block_size, block_grid)
            except (OSError, SafetensorError) as error:
                reason = getattr(error, "strerror", None) or first_line(error)
                raise OpdlmError(f"{destination} could not be written: {reason}; make room") from error

    def _probe(self) -> None:
        one_token_forward(self._model)

    def _receive(self, handle: WeightHandle) -> None:
        """Fetches a version, unless the actor already has this version or a newer one."""
        with self._arrived_lock:
            if handle.version <= self._newest_version():
                return
        pack = _fetch(handle)  # without the lock, which the decoding thread takes at every denoising step
        with self._arrived_lock:
            if handle.version > self._newest_version():
                self._arrived = handle.version, pack

    def _newest_version(self) -> int:
        return self._version if self._arrived is None else self._arrived[0]

    def _load_arrived(self) -> int | None:
        """Loads the weights that have arrived into the model; returns their version, or None if none have.

        Call this only while holding `_model_lock`.
        """
        with self._arrived_lock:
            arrived = self._arrived
        if arrived is None:
            return None
        self._version = -1  # until all of the pack is loaded and checked
        load_weights(self._model, arrived[1])
        with self._arrived_lock:
            self._version = arrived[0]
            if self._arrived is arrived:  # if loading fails it stays: the next call must not decode with older weights
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
    cache_tokens: int | None = None,
    gpu_setting: str = "rollout.gpus_per_actor",
    **placement: Any,
) -> Any:
    """Starts a `RolloutActor` and returns its handle; the pool repeats a call that dies with an actor.

    Args:
        name: name of the Ray actor.
        student: folder of the student model.
        restarts: how often Ray may restart the actor.
        cache_tokens: positions of the cache; None: it grows as needed.
        gpu_setting: what says `gpus`, for errors.
        placement: more of Ray's actor options, which place it on a node.
    """
    actor = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=restarts,
        max_concurrency=2 if on_new_weights == "continue" else 1,  # a decoding call, and a push during it
    )(RolloutActor)
    arguments = (student, dtype, int(cpus), on_new_weights, cuda_graphs, cache_tokens, gpus, gpu_setting)
    return actor.options(name=name, **placement).remote(*arguments)
