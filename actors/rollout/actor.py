"""Rollout actor: a student replica on its own device that decodes prompts to trajectories, continuously.

    driver ──add──► inbox ──► engine thread: step, step, step ... ──► outbox ──harvest──► driver
              load_weights, decode (evaluation), ... are jobs between two steps ▲

Requests come at any time and name the weight version to decode with, and carry its handle; nothing is decoded before
the actor holds that version. So an actor that died and was restarted fetches the current version by itself. One thread
(`engine_thread.py`) uses the model; Ray's threads hand it what they receive.

When weights arrive while sequences are decoded, `rollout.on_new_weights: finish` decodes these to their end, begins no
other, and then loads the weights. `continue` loads them before the next denoising step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError

from opdlm.actors.engine_guard import guarded
from opdlm.actors.progress import Teller, Watch
from opdlm.actors.rollout.engine_thread import EngineThread
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.stream import SequenceStream
from opdlm.actors.rollout.student import Student
from opdlm.common.config.schema import DecodingOrder, OnNewWeights
from opdlm.common.errors import OpdlmError, StreamLost, WeightsLost, last_line
from opdlm.common.grid import BlockGrid
from opdlm.common.model.device import device_for
from opdlm.common.types import (
    DecodeStats,
    RolloutRequest,
    ScoredTrajectory,
    StreamReport,
    Trajectory,
    WeightHandle,
    WeightPack,
)

Result = TypeVar("Result")

_CALLS_AT_ONCE = 8
"""Calls that Ray lets run beside each other: a harvest, more requests, a push, an evaluation, and some to spare."""


class RolloutActor(Student):
    """A student in an engine's thread, and the stream of the sequences that it decodes."""

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
        super().__init__(student, dtype, threads, cuda_graphs, cache_tokens, device_for(gpus, gpu_setting))
        self._continues = on_new_weights == "continue"
        self._stream: SequenceStream | None = None
        self._engine = EngineThread(self._changed, self._has_step, self._step, self._must_finish)

    def ready(self) -> None:
        """Returns once the student is loaded."""

    def forget_weights(self) -> None:
        """Drops all weights and sequences, because the run goes back to a checkpoint and they are no longer valid."""

        def forget() -> None:
            self._version = -1
            if self._stream is not None:
                self._stream.fail(OpdlmError("the run went back to a checkpoint, so what was being decoded is dropped"))

        with self._changed:
            self._timeline += 1
            self._arrived = None
        self._engine.run(forget)

    def load_weights(self, handle: WeightHandle) -> float:
        """Loads a published version into the model; returns the seconds it took. An older version changes nothing.

        With `finish`, it waits for the sequences that are being decoded. With `continue`, if the actor is decoding, it
        only fetches the weights; they are loaded before the next denoising step.

        Raises:
            WeightsLost: the published data is gone.
        """
        started = time.perf_counter()
        self._receive(handle)
        if not (self._continues and (self._engine.in_job or self._has_step())):
            self._on_engine(self._load_arrived)
        return time.perf_counter() - started

    def open_stream(self, settings: DecodeSettings, batch_size: int, ahead: int) -> int:
        """Begins a stream of sequences in place of the one before, whose sequences are dropped.

        Args:
            batch_size: number of slots.
            ahead: requests that may wait for a slot.

        Returns: number of requests that the actor would take.
        """

        def begin() -> int:
            if self._stream is not None:
                self._stream.fail(OpdlmError("a new stream has begun"))
            decoder = self._new_decoder(settings, batch_size)
            decoder.use_weights(max(self._version, 0))
            self._stream = SequenceStream(decoder, ahead, self._changed)
            return self._stream.room

        return self._engine.run(begin)

    def add(self, requests: Sequence[RolloutRequest], handle: WeightHandle) -> None:
        """Takes requests into the stream, to be decoded with the given version, or with a newer one.

        Raises:
            StreamLost: `open_stream` was not called since the actor started.
            ValueError: one of them cannot be decoded; then none is taken.
            WeightsLost: the published data is gone.
        """
        stream = self._open_stream
        self._receive(handle)
        stream.add(requests)

    def harvest(self, eager: bool) -> tuple[list[Trajectory | ScoredTrajectory], StreamReport]:
        """See `SequenceStream.harvest`; raises `StreamLost` as `add` does."""
        return self._open_stream.harvest(eager)

    @property
    def _open_stream(self) -> SequenceStream:
        if self._stream is None:
            raise StreamLost("the actor was restarted, and what it was decoding is lost")
        return self._stream

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
        if handle is not None:
            self._receive(handle)

        def decode() -> tuple[list[Trajectory], DecodeStats]:
            self._load_arrived()
            if handle is None and self._version >= 0:
                raise ValueError(f"decode without a handle: version {self._version} has replaced the folder's weights")
            decoder, tell = self._decoder(settings, batch_size), Teller(watch)
            takes_weights = self._continues and handle is not None

            def before_step() -> int | None:
                tell(decoder.progress)
                return self._load_arrived() if takes_weights else None

            return decoder.decode(requests, max(self._version, 0), update_weights=before_step)

        return self._on_engine(decode)

    def use_student(self, compute: Callable[..., Any], handle: WeightHandle | None, *arguments: Any) -> Any:
        """Computes something with the student besides decoding: `compute(model, mask_id, *arguments)`.

        Args:
            compute: a function of a module; it changes no weights.
            handle: as for `decode`.

        Raises:
            WeightsLost: the published data is gone.
        """
        if handle is not None:
            self._receive(handle)

        def use() -> Any:
            self._load_arrived()
            return compute(self._model, self._mask_id, *arguments)

        return self._on_engine(use)

    def save_student(self, handle: WeightHandle, destination: Path, grid: BlockGrid, order: DecodingOrder) -> None:
        """Writes the student of exactly this weight version as a model folder, in place of an earlier one there.

        Raises:
            OpdlmError: the disk did not take it.
            ValueError: the actor has newer weights.
            WeightsLost: the published data is gone.
        """
        self._receive(handle)

        def save() -> None:
            self._load_arrived()
            if self._version != handle.version:
                raise ValueError(f"saving version {handle.version}: the actor has version {self._version}")
            self._save(destination, grid, order)

        self._on_engine(save)

    # --- the engine's thread --------------------------------------------------------------------------------------

    def _on_engine(self, job: Callable[[], Result]) -> Result:
        """Runs a job between two denoising steps."""

        def run() -> Result:
            with guarded("student", self._probe):
                return job()

        return self._engine.run(run)

    def _has_step(self) -> bool:
        return self._stream is not None and self._stream.busy

    def _must_finish(self) -> bool:
        """Whether sequences must end before anything else, as weights have arrived that they must not see."""
        live = self._stream is not None and self._stream.live
        return live and self._arrived is not None and not self._continues

    def _step(self) -> None:
        stream, begin = self._stream, None
        assert stream is not None, "`_has_step` said so"
        try:
            with guarded("student", self._probe):
                with self._changed:  # a request is taken together with the weights that came before it
                    finishes, arrived = self._must_finish(), self._arrived
                    begin = None if finishes else stream.take()
                if arrived is not None and not finishes:
                    self._load_arrived()
                stream.step(begin)
        except BaseException as error:  # the driver gets it with its next `harvest`
            stream.fail(error, taken=bool(begin))

    def _load_arrived(self) -> int | None:
        version = super()._load_arrived()
        if version is not None and self._stream is not None:
            self._stream.decoder.use_weights(version)
        return version

    def _fetch(self, handle: WeightHandle) -> WeightPack:
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
    """Starts a `RolloutActor` and returns its handle. What an actor had when it died is dealt again.

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
        max_concurrency=_CALLS_AT_ONCE,
    )(RolloutActor)
    arguments = (student, dtype, int(cpus), on_new_weights, cuda_graphs, cache_tokens, gpus, gpu_setting)
    return actor.options(name=name, **placement).remote(*arguments)
