"""Checkpoint folders that answer prompts: a student by block decoding, any other checkpoint token by token.

`CheckpointDecoder` answers in this process, `ActorDecoder` (actor_decoder.py) over Ray actors. Evaluation, sweeps and
lm-eval take either.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.observation import StepObservation
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.stopping import StopStrings
from opdlm.actors.teacher.generation import ends_at, generate
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.load import load_model
from opdlm.common.model.prompt_encoder import PromptEncoder
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.common.types import DecodeStats, RolloutRequest, Trajectory
from opdlm.deploy.evaluate.options import LoadDtype

log = logging.getLogger("opdlm.evaluate")


@dataclass(frozen=True, slots=True)
class Answers:
    """Responses, and the steps and time that they took."""

    responses: list[np.ndarray]  # [R] int32 each
    denoising_steps: int
    """Denoising steps summed over sequences; an autoregressive model takes one per token."""
    seconds: float
    trajectories: list[Trajectory] = field(default_factory=list)
    """What a student in this process decoded; empty for others."""

    @property
    def tokens(self) -> int:
        """Response tokens."""
        return sum(len(response) for response in self.responses)

    @property
    def tokens_per_step(self) -> float:
        """Response tokens per denoising step (1 for an autoregressive model)."""
        return self.tokens / self.denoising_steps


class Decoder(ABC):
    """One checkpoint folder. A folder without a mask token is autoregressive.

    Args:
        block_size: None takes the checkpoint's own, else 4.
    """

    parallel = 1
    """Number of actors that decode side by side."""

    def __init__(self, folder: Path, block_size: int | None = None) -> None:
        self.folder = folder
        self.on_progress: Callable[[int], None] = lambda done: None
        """Called during `answer` with the number of prompts that are answered."""
        self.facts = read_facts(folder)
        if self.facts.is_student:
            require_mask(self.facts)
        self.tokenizer = load_tokenizer(folder)
        self._encode_text = PromptEncoder(self.tokenizer)
        if self.facts.end_tokens_note:
            log.warning(self.facts.end_tokens_note)
        grid = self.facts.grid(block_size)
        self.base = DecodeSettings(block_size=grid.block_size, block_grid=grid.kind, finish_blocks=False)

    @property
    def is_student(self) -> bool:
        """Whether the folder is a diffusion student."""
        return self.facts.is_student

    def encode(self, text: str, templated: bool = False) -> np.ndarray:
        """Token ids `[P] int32` of a prompt.

        Args:
            templated: a chat template has written the text, and with it all special tokens. Else the text gets the
                beginning tokens that the tokenizer adds.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if templated else self._encode_text(text)
        return np.array(ids, dtype=np.int32)

    def text(self, response: np.ndarray) -> str:
        """The text of a response `[R] int32` up to its first end-of-sequence token, without special tokens."""
        ends = np.flatnonzero(np.isin(response, self.facts.eos_ids))
        return self.tokenizer.decode(response[: ends[0]] if ends.size else response, skip_special_tokens=True)

    def count_empty(self, responses: Sequence[np.ndarray]) -> int:
        """How many of the responses `[R] int32` have no text: they ended at once, or hold only special tokens."""
        texts = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses)
        return sum(not text.strip() for text in texts)

    def check_room(self, requests: Sequence[RolloutRequest], block_size: int | None = None) -> None:
        """Raises `OpdlmError` for the first prompt that is empty, or too long for the context with its response."""
        grid = BlockGrid(block_size or self.base.block_size, self.base.block_grid)
        for request in requests:
            length, limit = request.prompt_ids.size, request.max_new_tokens
            if length == 0:
                raise OpdlmError(f"{request.prompt_id}: the prompt is empty; a response needs a token before it")
            end = grid.end_position(length, limit) if self.is_student else length + limit
            if end > (context := self.facts.context):
                whole = context - (context + grid.offset(length)) % grid.block_size if self.is_student else context
                fits = max(whole - length, 0)
                advice = f"at most {fits} new ones fit after it (--max-new-tokens)" if fits else "shorten the prompt"
                raise OpdlmError(
                    f"{request.prompt_id}: {length} prompt tokens and at most {limit} new ones take {end} positions, "
                    f"more than the context of {context} (config.json); {advice}"
                )

    @abstractmethod
    def answer(self, requests: Sequence[RolloutRequest], settings: DecodeSettings, batch_size: int) -> Answers:
        """Responses in the order of the requests. An AR checkpoint uses only the temperature of the settings."""


class CheckpointDecoder(Decoder):
    """Loads a folder once, into this process."""

    def __init__(
        self, folder: Path, block_size: int | None = None, device: str | None = None, dtype: LoadDtype = "auto"
    ) -> None:
        super().__init__(folder, block_size)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(folder, dtype).to(device)

    def answer(self, requests: Sequence[RolloutRequest], settings: DecodeSettings, batch_size: int) -> Answers:
        """See `Decoder`."""
        if self.is_student:
            trajectories, stats = self.decode(requests, settings, batch_size)
            responses = [t.response for t in trajectories]
            # The steps until the response was known, also where its last block was decoded to the end.
            steps = sum(int(t.reveal_step[: t.response_length].max()) for t in trajectories)
            return Answers(responses, steps, stats.seconds, trajectories)
        started = time.perf_counter()
        responses = self.continue_prompts(requests, settings.temperature, batch_size)
        return Answers(responses, sum(len(ids) for ids in responses), time.perf_counter() - started)

    def decode(
        self,
        requests: Sequence[RolloutRequest],
        settings: DecodeSettings,
        batch_size: int,
        observer: Callable[[StepObservation], None] | None = None,
    ) -> tuple[list[Trajectory], DecodeStats]:
        """Block decoding with a student; `observer` sees every denoising step."""
        mask_id, facts = require_mask(self.facts), self.facts
        decoder = BlockDecoder(
            self.model, settings, mask_id, facts.eos_ids, batch_size, tokens=facts.tokens, form=facts.form
        )

        decoder.stops = StopStrings(self.tokenizer)

        def before_step() -> None:
            self.on_progress(len(decoder.progress().finished))

        return decoder.decode(requests, observer=observer, update_weights=before_step)

    def look_up(self, requests: Sequence[RolloutRequest], drafts: int) -> Answers:
        """An autoregressive model's greedy answers, one prompt at a time, with drafts that it has read before.

        Args:
            drafts: most draft tokens in a forward, which transformers' prompt lookup finds in prompt and response.

        Returns: the answers, with the number of forwards as `denoising_steps`.
        """
        forwards = 0

        def count(*_: object) -> None:
            nonlocal forwards
            forwards += 1

        started = time.perf_counter()
        hook = self.model.register_forward_hook(count)
        try:
            responses = self.continue_prompts(requests, 0.0, 1, drafts)
        finally:
            hook.remove()
        return Answers(responses, forwards, time.perf_counter() - started)

    def continue_prompts(
        self, requests: Sequence[RolloutRequest], temperature: float, batch_size: int, prompt_lookup: int = 0
    ) -> list[np.ndarray]:
        """Autoregressive responses, `[R] int32` each; greedy at temperature 0, else with the first request's seed.

        A response ends with the token with which its text first holds a stop string of its request.

        Args:
            prompt_lookup: as in `generate`.
        """
        limit = max(request.max_new_tokens for request in requests)
        prompts = [request.prompt_ids for request in requests]
        seed = requests[0].seed
        done: list[int] = []

        def on_batch(places: Sequence[int]) -> None:
            done.extend(places)
            self.on_progress(len(done))

        facts = self.facts
        responses = generate(
            self.model,
            prompts,
            limit,
            facts.eos_ids,
            batch_size,
            temperature,
            seed,
            facts.tokens,
            on_batch,
            ends_at([request.stop for request in requests], StopStrings(self.tokenizer)),
            prompt_lookup,
        )
        return cut_to_limits(responses, requests)


def cut_to_limits(responses: Sequence[np.ndarray], requests: Sequence[RolloutRequest]) -> list[np.ndarray]:
    """Cuts responses to their own limits: AR generation has one limit per call, the longest."""
    return [ids[: request.max_new_tokens] for ids, request in zip(responses, requests, strict=True)]
