"""Text in, text out: what `opdlm.load(folder).generate([...])` and `opdlm generate` do."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from opdlm.actors.rollout.observation import StepObservation
from opdlm.common.config.schema import Strategy
from opdlm.common.data.chat import EMPTY, ChatRefused, chat_prompt
from opdlm.common.data.unknown import UnknownCharacters
from opdlm.common.errors import OpdlmError
from opdlm.common.text import text_fault
from opdlm.common.types import RolloutRequest
from opdlm.deploy.evaluate.decoders import CheckpointDecoder


@dataclass(frozen=True, slots=True)
class Generation:
    """A response to one prompt."""

    prompt: str
    text: str
    """The response without special tokens."""
    ids: np.ndarray  # [R] int32, up to and with the first end-of-sequence token
    reveal_step: np.ndarray  # [R] int, the denoising step (from 1) that revealed each token
    denoising_steps: int

    @property
    def is_empty(self) -> bool:
        """Whether the response has no text: it ended at once, or holds only special tokens and spaces."""
        return not self.text.strip()

    @property
    def tokens_per_step(self) -> float:
        """Response tokens per denoising step; 1 for an autoregressive model."""
        return len(self.ids) / self.denoising_steps


class Model(CheckpointDecoder):
    """A checkpoint in this process that answers prompts: a student block by block, others token by token.

    `model.model` is the causal LM of transformers, `model.tokenizer` its tokenizer, and `model.facts` what its folder
    says.
    """

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        strategy: Strategy | None = None,
        threshold: float = 0.9,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        block_size: int | None = None,
        chat: bool = False,
        thinking: bool | None = None,
        seed: int = 0,
        batch_size: int = 64,
        observer: Callable[[StepObservation], None] | None = None,
    ) -> list[Generation]:
        """Decodes prompts, in their order.

        Args:
            max_new_tokens: longest response, in tokens.
            strategy: remasking strategy of a student; `threshold` belongs to the dynamic ones. Default: the student's
                (`ModelFacts.usual_strategies`).
            temperature: 0 is greedy. An autoregressive model then samples from the whole vocabulary.
            block_size: None takes the checkpoint's own.
            chat: puts each prompt through the chat template, with `thinking` as its `enable_thinking`.
            seed: of sampling; the i-th prompt has `seed + i`.
            batch_size: sequences decoded side by side.
            observer: sees every denoising step of a student.

        Raises:
            OpdlmError: a prompt is empty, too long or no text, or an option does not fit the checkpoint.
        """
        if not prompts:
            return []
        if thinking is not None and not chat:
            raise OpdlmError("thinking: found without chat; only a chat template knows it")
        _check_prompts(prompts)
        texts = [self._text(prompt, thinking) if chat else prompt for prompt in prompts]
        settings = replace(
            self.base,
            block_size=block_size or self.base.block_size,
            strategy=strategy or self.facts.usual_strategies[-1],
            threshold=threshold,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        requests = [
            RolloutRequest(i, _name(prompt), self.encode(text, chat), max_new_tokens, seed=seed + i)
            for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]
        self.check_room(requests, settings.block_size)
        if self.is_student:
            trajectories, _ = self.decode(requests, settings, batch_size, observer)
            return [
                self._generation(prompt, t.response, t.reveal_step[: t.response_length], t.denoising_steps)
                for prompt, t in zip(prompts, trajectories, strict=True)
            ]
        if observer is not None:
            raise OpdlmError(
                f"trace: {self.folder} is autoregressive; there are no blocks to show (opdlm convert makes a student)"
            )
        if (top_k, top_p) != (0, 1.0):
            raise OpdlmError(f"top_k, top_p: {self.folder} is autoregressive; it samples from the whole vocabulary")
        responses = self.continue_prompts(requests, temperature, batch_size)
        return [
            self._generation(prompt, ids, np.arange(1, len(ids) + 1), len(ids))
            for prompt, ids in zip(prompts, responses, strict=True)
        ]

    def unknown_characters(self, prompts: Sequence[str]) -> str | None:
        """One line about the characters of prompts that the tokenizer does not know; None: it knows them all."""
        unknown = UnknownCharacters(self.tokenizer)
        for prompt in prompts:
            unknown.note(_name(prompt), prompt, self.encode(prompt).tolist())
        return unknown.line()

    def _text(self, prompt: str, thinking: bool | None) -> str:
        try:
            return chat_prompt(self.tokenizer, prompt, thinking)
        except ChatRefused as error:
            raise OpdlmError(f"{_name(prompt)}: {error}") from None

    def _generation(self, prompt: str, ids: np.ndarray, reveal_step: np.ndarray, steps: int) -> Generation:
        return Generation(prompt, self.text(ids), ids, reveal_step, steps)


def _name(prompt: str) -> str:
    return f"prompt {prompt[:30]!r}"


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise OpdlmError("prompts: found one text; expected a list of texts")
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            raise OpdlmError(f"prompts: prompt {number} is {reprlib.repr(prompt)}; expected text")
        if fault := text_fault(prompt):
            raise OpdlmError(f"{_name(prompt)} holds {fault}; give text in UTF-8")
        if not prompt:
            raise OpdlmError(f"{_name(prompt)}: {EMPTY}; a response needs a token before it")
