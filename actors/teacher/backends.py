"""The interface of a teacher backend, and the choice of one: transformers in this process, or vLLM. Imports no ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from opdlm.actors.engine_guard import one_token_forward
from opdlm.actors.progress import OnBatch, unheard
from opdlm.actors.rollout.stopping import StopStrings
from opdlm.actors.teacher.generation import ends_at, generate
from opdlm.actors.teacher.scoring import score
from opdlm.common.config.schema import TeacherConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.model.device import device_for
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import input_device, load_model
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.common.types import TeacherTargets, Trajectory


class TeacherBackend(Protocol):
    """What a teacher can do. To add a backend: implement this class and choose it in `make_backend`."""

    def score(self, trajectories: list[Trajectory], on_batch: OnBatch = unheard) -> list[TeacherTargets]:
        """The targets of each trajectory, in order; raises rather than make one up. `on_batch`: `actors/progress.py`"""
        ...

    def generate(
        self,
        prompts: list[np.ndarray],
        max_new_tokens: int,
        batch_size: int,
        temperature: float,
        seed: int,
        on_batch: OnBatch = unheard,
        stops: Sequence[Sequence[str]] = (),
    ) -> list[np.ndarray]:
        """Responses to prompts `[P] int32`, `[R] int32` each, in order; greedy at temperature 0.

        Args:
            stops: of each prompt the stop strings that end its response, or nothing for none at all.
        """
        ...

    def probe(self) -> None:
        """Makes one token to see whether the engine is alive; raises if it is not (actors/engine_guard.py)."""
        ...


def make_backend(folder: str, config: TeacherConfig) -> TeacherBackend:
    """Loads the teacher into the backend that the run file names.

    Raises:
        OpdlmError: the folder is unusable, or the teacher does not fit the devices that the run file gives it.
    """
    if config.backend == "vllm":
        from opdlm.actors.teacher.vllm import VllmTeacher  # vLLM is an extra, and slow to import

        return VllmTeacher(folder, config)
    return TransformersTeacher(folder, config)


class TransformersTeacher:
    """The teacher as a transformers model in this process.

    It is on one device, or with `device_map: auto` spread over all GPUs that the process sees. Without a share of GPUs
    it is on the CPU.
    """

    def __init__(self, folder: str, config: TeacherConfig) -> None:
        device = device_for(config.gpus_per_actor, "teacher.gpus_per_actor")
        if config.device_map == "auto":
            self._model = load_model(folder, config.dtype, device_map="auto" if device == "cuda" else "cpu")
            if device == "cuda":  # a model that fits one device has no map
                refuse_offload(getattr(self._model, "hf_device_map", {"": str(input_device(self._model))}), folder)
        else:
            self._model = load_model(folder, config.dtype).to(device)
        facts = read_facts(folder)
        self._eos_ids, self._tokens = facts.eos_ids, facts.tokens
        self._config, self._folder = config, folder

    def score(self, trajectories: list[Trajectory], on_batch: OnBatch = unheard) -> list[TeacherTargets]:
        """See `actors/teacher/scoring.py`."""
        config = self._config
        return score(
            self._model, trajectories, config.targets, config.top_k, config.batch_tokens, self._tokens, on_batch
        )

    def generate(
        self,
        prompts: list[np.ndarray],
        max_new_tokens: int,
        batch_size: int,
        temperature: float,
        seed: int,
        on_batch: OnBatch = unheard,
        stops: Sequence[Sequence[str]] = (),
    ) -> list[np.ndarray]:
        """See `actors/teacher/generation.py`."""
        return generate(
            self._model,
            prompts,
            max_new_tokens,
            self._eos_ids,
            batch_size,
            temperature,
            seed,
            self._tokens,
            on_batch,
            ends_at(stops, StopStrings(load_tokenizer(self._folder))) if any(stops) else None,
        )

    def probe(self) -> None:
        """See `TeacherBackend`."""
        one_token_forward(self._model)


def refuse_offload(device_map: Mapping[str, Any], folder: str) -> None:
    """Refuses a device map that has layers in host memory or on disk: they would be copied to a GPU in every forward.

    Args:
        device_map: place of each part of the model, as accelerate chose it.
        folder: the teacher's folder, for the error.

    Raises:
        OpdlmError: a part is on the CPU or on disk.
    """
    outside = [name for name, place in device_map.items() if place in ("cpu", "disk")]
    if outside:
        raise OpdlmError(
            f"teacher.device_map: {folder} does not fit the actor's GPUs: {len(outside)} of {len(device_map)} parts "
            f"(first `{outside[0]}`) would be on the {device_map[outside[0]]}; raise teacher.gpus_per_actor"
        )
