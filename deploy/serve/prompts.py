"""Requests of the API -> requests of the decoder."""

from __future__ import annotations

from itertools import product

import numpy as np
from transformers import PreTrainedTokenizerBase

from opdlm.common.config.base import WITH_THRESHOLD
from opdlm.common.data.chat import chat_prompt
from opdlm.common.data.conversation import read_conversation
from opdlm.common.errors import OpdlmError
from opdlm.common.model.facts import ModelFacts
from opdlm.common.model.prompt_encoder import PromptEncoder
from opdlm.common.types import RolloutRequest
from opdlm.deploy.serve.errors import ApiError
from opdlm.deploy.serve.options import ServeOptions
from opdlm.deploy.serve.schema import ChatRequest, CompletionRequest


class Prompts:
    """Encodes prompts and fills in what a request leaves to the server."""

    def __init__(self, options: ServeOptions, facts: ModelFacts, tokenizer: PreTrainedTokenizerBase) -> None:
        self._options, self._facts, self._tokenizer = options, facts, tokenizer
        self._encode = PromptEncoder(tokenizer)
        self._block = facts.grid(options.block_size).block_size

    def requests(self, given: CompletionRequest | ChatRequest, seed: int) -> tuple[list[RolloutRequest], list[str]]:
        """The sequences of a request, and the text in front of each: choice `n * prompt + k` is response k of a prompt.

        Args:
            seed: of a request that brings none. Response k has the seed plus k.

        Raises:
            ApiError: 400, the request cannot be decoded here.
        """
        self._check(given)
        if isinstance(given, ChatRequest):
            prompts, echoes = [self._conversation(given)], [""]
        else:
            prompts = [self._ids(prompt) for prompt in given.prompts]
            echoes = [self._text(prompt) if given.echo else "" for prompt in given.prompts]
        first = seed if given.seed is None else given.seed
        found = [
            RolloutRequest(
                index=0,
                prompt_id="of this request",
                prompt_ids=np.array(ids, dtype=np.int32),
                max_new_tokens=self._limit(given, len(ids)),
                seed=first + choice,
                threshold=given.threshold,
                sampling=self._sampling(given),
                watched=given.steps,
            )
            for ids, choice in product(prompts, range(given.n))
        ]
        return found, [echo for echo in echoes for _ in range(given.n)]

    def _check(self, given: CompletionRequest | ChatRequest) -> None:
        options = self._options
        if not self._facts.is_student:
            for name in ("strategy", "threshold"):
                if (found := getattr(given, name)) is not None:
                    raise ApiError(400, f"{name}: found {found!r}; the model is autoregressive", "no_blocks", name)
            if given.steps:
                raise ApiError(400, "steps: the model is autoregressive and has none", "no_blocks", "steps")
            return
        if given.strategy not in (None, options.strategy):
            raise ApiError(
                400,
                f"strategy: found {given.strategy!r}; this server decodes with {options.strategy!r} (`opdlm serve "
                "--strategy`), which no request can change",
                "strategy_fixed",
                "strategy",
            )
        if given.threshold is not None and options.strategy not in WITH_THRESHOLD:
            raise ApiError(400, f"threshold: strategy {options.strategy!r} has none", "no_threshold", "threshold")
        if options.strategy != "verified":
            return
        for name in ("temperature", "top_p"):
            if (found := getattr(given, name)) not in (None, fixed := getattr(options, name)):
                raise ApiError(
                    400, f"{name}: found {found}; lossless decoding has the server's, {fixed}", "sampling_fixed", name
                )
        if given.wants_logprobs:
            raise ApiError(400, "logprobs: lossless decoding keeps none", "no_logprobs", "logprobs")

    def _sampling(self, given: CompletionRequest | ChatRequest) -> tuple[float, float]:
        temperature = self._options.temperature if given.temperature is None else given.temperature
        return temperature, self._options.top_p if given.top_p is None else given.top_p

    def _limit(self, given: CompletionRequest | ChatRequest, prompt: int) -> int:
        asked = given.max_tokens
        if isinstance(given, ChatRequest) and given.max_completion_tokens is not None:
            asked = given.max_completion_tokens
        if asked is not None:
            return asked
        return max(1, min(self._options.max_new_tokens, self._facts.context - prompt - 2 * self._block))

    def _conversation(self, given: ChatRequest) -> list[int]:
        try:
            text = chat_prompt(self._tokenizer, read_conversation(given.messages))
        except (OpdlmError, ValueError) as error:
            raise ApiError(400, f"messages: {error}", "invalid_messages", "messages") from None
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids(self, prompt: str | list[int]) -> list[int]:
        ids = self._encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError(400, "prompt: it is empty; a response needs a token before it", "empty_prompt", "prompt")
        size = self._facts.vocab_size
        if (wrong := next((token for token in ids if not 0 <= token < size), None)) is not None:
            raise ApiError(400, f"prompt: found token {wrong}; expected 0 to {size - 1}", "unknown_token", "prompt")
        return ids

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else str(self._tokenizer.decode(prompt))
