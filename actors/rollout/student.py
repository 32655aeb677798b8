"""The student of a rollout actor: its model, the weight versions that reach it, and its decoders. Imports no ray."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import torch
from safetensors import SafetensorError

from opdlm.actors.engine_guard import one_token_forward
from opdlm.actors.rollout.cuda_graphs import CudaGraphs
from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.stopping import StopStrings
from opdlm.common.config.schema import DecodingOrder
from opdlm.common.errors import OpdlmError, first_line
from opdlm.common.grid import BlockGrid
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.folder import save_student
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import has_tokenizer, load_tokenizer
from opdlm.common.types import WeightHandle, WeightPack
from opdlm.common.weights import load_weights


class Student:
    """A model whose weights are replaced while it is used. One thread uses it; any thread may receive weights.

    Args:
        student: its folder.
        threads: that torch uses.
        cache_tokens: positions of the cache, which all decoders share; None: it grows as needed.
        device: `cpu` or `cuda`.
    """

    def __init__(
        self, student: str, dtype: str, threads: int, cuda_graphs: bool, cache_tokens: int | None, device: str
    ) -> None:
        torch.set_num_threads(max(threads, 1))
        self._folder, facts = student, read_facts(student)
        self._mask_id, self._facts = require_mask(facts), facts
        self._model = load_model(student, dtype).to(device)
        self._make_recorder = CudaGraphs if cuda_graphs else None
        self._cache = SlotCache(self._model, cache_tokens)
        self._version = -1
        """Weight version in the model; -1: none. Start weights are pushed too, so that a broken path shows at once."""
        self._changed = threading.Condition()
        """Held while a thread reads or replaces `_arrived`; never during a fetch or a forward."""
        self._arrived: tuple[int, WeightPack] | None = None
        """The newest version that was fetched and is not in the model yet."""
        self._timeline = 0
        """How often the run went back to a checkpoint: versions that were published before are no longer valid."""
        self._decoders: dict[tuple[DecodeSettings, int], BlockDecoder] = {}

    def _decoder(self, settings: DecodeSettings, batch_size: int) -> BlockDecoder:
        """The decoder of whole calls with these settings."""
        key = (settings, batch_size)
        if key not in self._decoders:
            self._decoders[key] = self._new_decoder(settings, batch_size)
            if has_tokenizer(self._folder):
                self._decoders[key].stops = StopStrings(load_tokenizer(self._folder))
        return self._decoders[key]

    def _new_decoder(self, settings: DecodeSettings, batch_size: int) -> BlockDecoder:
        return BlockDecoder(
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

    def _probe(self) -> None:
        one_token_forward(self._model)

    def _fetch(self, handle: WeightHandle) -> WeightPack:
        """Gets published weights; may take long."""
        raise NotImplementedError

    def _receive(self, handle: WeightHandle) -> None:
        """Fetches a version, unless the actor already has this version or a newer one."""
        with self._changed:
            if handle.version <= self._newest_version():
                return
            timeline = self._timeline
        pack = self._fetch(handle)  # without the lock, which the engine takes at every denoising step
        with self._changed:
            if timeline == self._timeline and handle.version > self._newest_version():
                self._arrived = handle.version, pack

    def _newest_version(self) -> int:
        return self._version if self._arrived is None else self._arrived[0]

    def _load_arrived(self) -> int | None:
        """Loads the weights that have arrived into the model; returns their version, or None if none have."""
        with self._changed:
            arrived = self._arrived
        if arrived is None:
            return None
        self._version = -1  # until all of the pack is loaded and checked
        load_weights(self._model, arrived[1])
        with self._changed:
            self._version = arrived[0]
            if self._arrived is arrived:  # if loading fails it stays: the next call must not decode with older weights
                self._arrived = None
        return self._version

    def _save(self, destination: Path, grid: BlockGrid, order: DecodingOrder) -> None:
        """Writes a model folder in place of an earlier one; raises `OpdlmError` if the disk does not take it."""
        try:
            shutil.rmtree(destination, ignore_errors=True)
            save_student(self._model, self._folder, destination, grid, order)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise OpdlmError(f"{destination} could not be written: {reason}; make room") from error
