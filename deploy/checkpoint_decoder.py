"""A checkpoint folder as something that answers prompts in this process: block decoding or AR, by what it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from actors.ar_generate import generate
from actors.block_decoder import BlockDecoder, StepView
from actors.decode_settings import DecodeSettings
from common.models import load_model, load_tokenizer, read_facts, require_mask
from common.types import RolloutRequest


@dataclass(frozen=True, slots=True)
class Answers:
    """Responses and what they cost."""

    responses: list[np.ndarray]  # [R] int32 each
    tokens_per_step: float
    seconds: float


class CheckpointDecoder:
    """Loads a folder once; decodes in any number of ways.

    A folder without a mask token is autoregressive. `block_size` None takes the checkpoint's own, else 4.
    """

    def __init__(self, folder: Path, block_size: int | None = None) -> None:
        self.facts = read_facts(folder)
        self.tokenizer = load_tokenizer(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(folder, "auto").to(device)
        self.base = DecodeSettings(
            block_size=block_size or self.facts.block_size or 4, block_grid=self.facts.block_grid or "absolute"
        )

    @property
    def is_student(self) -> bool:
        """Whether the folder is a diffusion student."""
        return self.facts.is_student

    def encode(self, text: str) -> np.ndarray:
        """Token ids `[P] int32` of a prompt."""
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def decode(
        self,
        requests: Sequence[RolloutRequest],
        settings: DecodeSettings,
        batch_size: int,
        observer: Callable[[StepView], None] | None = None,
    ) -> Answers:
        """Block decoding."""
        decoder = BlockDecoder(self.model, settings, require_mask(self.facts), self.facts.eos_ids, batch_size)
        trajectories, stats = decoder.decode(requests, observer=observer)
        per_step = stats.response_tokens / stats.denoising_steps
        return Answers([t.response for t in trajectories], per_step, stats.seconds)

    def generate(self, prompts: Sequence[np.ndarray], max_new_tokens: int, batch_size: int) -> Answers:
        """Greedy autoregressive decoding."""
        started = time.perf_counter()
        responses = generate(self.model, prompts, max_new_tokens, self.facts.eos_ids, batch_size)
        return Answers(responses, 1.0, time.perf_counter() - started)
