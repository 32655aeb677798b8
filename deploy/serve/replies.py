"""The answers of the API, in the shape of OpenAI's."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from opdlm.actors.rollout.observation import Step


@dataclass(slots=True)
class Piece:
    """A further part of one response, or all of it."""

    choice: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    finish: str | None = None
    """`stop` or `length`; None: the response goes on."""
    step: Step | None = None
    """A denoising step, in a piece without text."""


@dataclass(slots=True)
class Usage:
    """What a request took, summed over its responses."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    denoising_steps: int = 0

    def body(self) -> dict[str, Any]:
        """OpenAI's `usage`, with the denoising steps and the response tokens per step."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "denoising_steps": self.denoising_steps,
            "tokens_per_step": round(self.completion_tokens / self.denoising_steps, 3) if self.denoising_steps else 0.0,
        }


class Replies:
    """Makes the bodies of one request's answers.

    Args:
        chat: whether it is a chat.
        logprobs: whether tokens have their log-probabilities.
    """

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, chat: bool, logprobs: bool) -> None:
        self._model, self._tokenizer, self._chat, self._logprobs = model, tokenizer, chat, logprobs
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed: one piece a response."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = [self._choice(piece, {"message": {"role": "assistant", "content": piece.text}}) for piece in pieces]
        return self._body(kind, choices) | {"usage": usage.body()}

    def part(self, piece: Piece, first: bool) -> dict[str, Any]:
        """The body of one event of a stream. `first`: of its response."""
        delta = ({"role": "assistant"} if first else {}) | {"content": piece.text}
        return self._body(self._streamed, [self._choice(piece, {"delta": delta})])

    def usage_part(self, usage: Usage) -> dict[str, Any]:
        """The body of the event that has the usage."""
        return self._body(self._streamed, []) | {"usage": usage.body()}

    @property
    def _streamed(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _choice(self, piece: Piece, of_chat: Mapping[str, Any]) -> dict[str, Any]:
        content: Mapping[str, Any] = of_chat if self._chat else {"text": piece.text}
        body = {"index": piece.choice, **content, "finish_reason": piece.finish, "logprobs": self._of_tokens(piece)}
        return body if piece.step is None else body | {"step": self._step(piece.step)}

    def _step(self, step: Step) -> dict[str, Any]:
        """A denoising step: its number, and what it did at each position that had no token before it."""
        texts = (str(self._tokenizer.decode([token])) for token in step.ids)
        sure: list[float | None] = [None] * len(step.ids)
        if step.confidences is not None:
            sure = [round(confidence, 4) for confidence in step.confidences]
        return {
            "number": step.number,
            "tokens": [
                {"position": position, "text": text, "confidence": confidence, "revealed": revealed}
                for position, text, confidence, revealed in zip(step.positions, texts, sure, step.revealed, strict=True)
            ],
        }

    def _of_tokens(self, piece: Piece) -> dict[str, Any] | None:
        if not self._logprobs or piece.logprobs is None:
            return None
        texts = [str(self._tokenizer.decode([token])) for token in piece.ids]
        if not self._chat:
            return {"tokens": texts, "token_logprobs": piece.logprobs, "top_logprobs": None, "text_offset": None}
        pairs = zip(texts, piece.logprobs, strict=True)
        return {
            "content": [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logprob in pairs
            ]
        }
