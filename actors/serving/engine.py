"""The engine of a server's replica: a model, its decoder, and a thread that alone uses both.

submit ──► inbox ──a slot is free──► decoder ──a block is finished──► deliver(Tokens)
cancel ──► dropped before the next step            take ──► waits until what is being decoded has ended
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch

from opdlm.actors.engine_guard import guarded, one_token_forward
from opdlm.actors.rollout.cuda_graphs import CudaGraphs
from opdlm.actors.rollout.engine_thread import EngineThread
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.actors.rollout.observation import Step, StepWatch
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.serving.autoregressive import BatchDecoder
from opdlm.actors.serving.decoder import ServedDecoder, Tokens
from opdlm.common.errors import OpdlmError
from opdlm.common.model.facts import ModelFacts, read_facts, require_mask
from opdlm.common.model.load import load_model
from opdlm.common.types import RolloutRequest, Trajectory

_MAY_DIFFER = ("folder", "end_tokens_note")
"""Facts in which folders of the same model may differ."""
Deliver = Callable[[Tokens | BaseException], None]
"""Gets the tokens of one request, block by block, the last with `end`; or what ended the request. It must not raise.
Of a watched request it gets each denoising step, too."""


@dataclass(slots=True)
class _Live:
    """One request that has not ended."""

    deliver: Deliver
    whole: bool
    """Whether it gets all its tokens at its end."""
    sent: int = 0
    steps: int = 0


class ServingEngine:
    """Decodes requests that come one by one. Its methods can be called from any thread.

    Args:
        checkpoint: folder of a student, or of an autoregressive model, which is generated in static batches.
        settings: how it decodes; the temperature, top-p and threshold are those of requests that bring none.
        slots: sequences that it decodes at a time.
        threads: that torch uses.
        cuda_graphs, cache_tokens: of a student, see `Student`.
        device: `cpu` or `cuda`.
        version: weight version of the folder.
    """

    def __init__(
        self,
        checkpoint: str,
        settings: DecodeSettings,
        slots: int,
        dtype: str,
        threads: int,
        cuda_graphs: bool = False,
        cache_tokens: int | None = None,
        device: str = "cpu",
        version: int = 0,
    ) -> None:
        torch.set_num_threads(max(threads, 1))
        self._facts = facts = read_facts(checkpoint)
        self._model = load_model(checkpoint, dtype).to(device)
        self._dtype, self._version = dtype, version
        self._changed, self._reload_lock = threading.Condition(), threading.Lock()
        settings = replace(settings, keep_logprobs=settings.strategy != "verified")
        self._serving: ServedDecoder | BatchDecoder
        if facts.is_student:
            self._serving = ServedDecoder(
                self._model,
                settings,
                require_mask(facts),
                facts.eos_ids,
                slots,
                CudaGraphs if cuda_graphs else None,
                facts.tokens,
                facts.form,
                SlotCache(self._model, cache_tokens),
            )
        else:
            self._serving = BatchDecoder(self._model, settings, facts.eos_ids, slots, facts.tokens, self._between)
        self._watch = StepWatch(self._deliver_step)
        self._serving.use_weights(version)
        self._inbox: deque[RolloutRequest] = deque()
        self._live: dict[int, _Live] = {}
        self._cancelled: set[int] = set()
        self._reloads = self._next = 0
        self._engine = EngineThread(self._changed, self._has_step, self._step, self._must_finish)

    @property
    def version(self) -> int:
        """Weight version in the model."""
        return self._version

    @property
    def unfinished(self) -> int:
        """Number of requests that have not ended."""
        return len(self._live)

    def submit(self, request: RolloutRequest, deliver: Deliver, whole: bool = False) -> int:
        """Takes a request; returns the index by which it can be cancelled. The request's own index does not count.

        Args:
            whole: deliver all tokens at the end of the response, in one part.

        Raises:
            ValueError: it cannot be decoded.
        """
        self._serving.check([request])
        with self._changed:
            index, self._next = self._next, self._next + 1
            self._live[index] = _Live(deliver, whole)
            self._inbox.append(replace(request, index=index))
            self._changed.notify_all()
        return index

    def cancel(self, index: int) -> None:
        """Drops a request, if it has not ended; its slot is free in the next step. Nothing is delivered any more."""
        with self._changed:
            if self._live.pop(index, None) is not None:
                self._cancelled.add(index)
                self._changed.notify_all()

    def weights_of(self, folder: str) -> Mapping[str, torch.Tensor]:
        """The state dict of another folder of the same model, which `take` can be given.

        Raises:
            OpdlmError: the folder cannot be used, or it is another model.
        """
        self.check_facts(read_facts(folder))
        weights: Mapping[str, torch.Tensor] = load_model(folder, self._dtype).state_dict()
        self.check_weights(weights, folder)
        return weights

    def check_facts(self, facts: ModelFacts) -> None:
        """Raises `OpdlmError` where weights of a folder with these facts cannot replace those that are served."""
        for name in [field.name for field in fields(facts) if field.name not in _MAY_DIFFER]:
            if (found := getattr(facts, name)) != (expected := getattr(self._facts, name)):
                raise OpdlmError(
                    f"{facts.folder}: {name}: found {found}; expected {expected}, as in the model that is served; "
                    "start another server for another model"
                )

    def check_weights(self, weights: Mapping[str, torch.Tensor], folder: str) -> None:
        """Raises `OpdlmError` where a state dict is not of the model that is served. `folder`: for the error."""
        own = self._model.state_dict()
        if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in own.items()}:
            raise OpdlmError(f"{folder}: its weights have other names or shapes than those that are served")

    def take(self, weights: Mapping[str, torch.Tensor], version: int) -> int:
        """Takes a state dict that `check_weights` has passed, once what is being decoded has ended.

        Requests that wait are decoded with the new weights. An older version changes nothing.

        Returns: the version in the model.
        """
        with self._reload_lock:
            if version <= self._version:
                return self._version

            def load() -> int:
                self._model.load_state_dict(weights)
                self._serving.use_weights(version)
                self._version = version
                return version

            with self._changed:
                self._reloads += 1
            try:
                return self._engine.run(load)
            finally:
                with self._changed:
                    self._reloads -= 1
                    self._changed.notify_all()

    # --- the engine's thread --------------------------------------------------------------------------------------

    def _has_step(self) -> bool:
        return bool(self._inbox) or self._decoding() or bool(self._cancelled)

    def _decoding(self) -> bool:
        return self._serving.occupied + self._serving.waiting > 0

    def _must_finish(self) -> bool:
        return self._decoding()

    def _step(self) -> None:
        try:
            with guarded("served model", lambda: one_token_forward(self._model)):
                self._drop_cancelled()
                with self._changed:
                    room = 0 if self._reloads else max(self._serving.room, 0)
                    begin = [self._inbox.popleft() for _ in range(min(room, len(self._inbox)))]
                if begin:
                    self._serving.add(begin)
                self._deliver(self._serving.step(self._watch))
        except BaseException as error:  # each request gets it
            with self._changed:
                live, self._live = self._live, {}
                self._inbox.clear()
                self._cancelled.clear()
                self._serving.clear()
            for one in live.values():
                one.deliver(error)

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            self._inbox = deque(request for request in self._inbox if request.index not in cancelled)
        self._serving.drop(cancelled)

    def _between(self, ended: list[Trajectory]) -> None:
        """What an autoregressive batch does after each of its tokens."""
        self._drop_cancelled()
        self._deliver(ended)

    def _deliver(self, ended: list[Trajectory]) -> None:
        with self._changed:
            live = dict(self._live)
        for trajectory in ended:
            if (one := live.get(trajectory.index)) is not None:
                with self._changed:
                    self._live.pop(trajectory.index, None)
                one.deliver(_last(trajectory, one.sent))
        sent = {index: one.sent for index, one in live.items() if not one.whole}
        for index, tokens in self._serving.finished_blocks(sent).items():
            live[index].sent += len(tokens.ids)
            live[index].deliver(tokens)

    def _deliver_step(self, index: int, step: Step) -> None:
        """A sequence that is put back and decoded anew tells no step again that it has told."""
        with self._changed:
            one = self._live.get(index)
        if one is not None and step.number > one.steps:
            one.steps = step.number
            one.deliver(Tokens((), None, step.number, weight_version=self._version, step=step))


def _last(trajectory: Trajectory, sent: int) -> Tokens:
    """The tokens of an ended sequence behind those that were sent; without the token that ended it."""
    length = trajectory.response_length
    stop = length - (trajectory.finish_reason == "eos")
    logprobs = trajectory.reveal_logprob
    return Tokens(
        tuple(trajectory.response_ids[sent:stop].tolist()),
        None if logprobs is None else tuple(logprobs[sent:stop].tolist()),
        trajectory.denoising_steps,
        trajectory.finish_reason,
        trajectory.weight_version,
    )
