"""An autoregressive model behind the interface of `ServedDecoder`: static batches of transformers' `generate`.

    waiting ──all places are free──► one `generate` for up to `batch_size` requests ──token──► between(ended)

A batch takes as many tokens as its longest response. A request that ends earlier is delivered at once, but its place
stays empty until the batch has ended: that is what `generate` can do, and what a block decoder is compared with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from opdlm.actors.rollout.denoise import Observer
from opdlm.actors.rollout.sampling import LOWEST_TEMPERATURE, draw_candidates, hashed_uniform
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.serving.decoder import Tokens
from opdlm.actors.teacher.generation import TokensOnly, left_padded
from opdlm.common.model.load import input_device
from opdlm.common.seeds import as_int64, wrapped
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import FinishReason, RolloutRequest, Trajectory

Between = Callable[[list[Trajectory]], None]
"""Called after each token of a batch with the responses that it ended. It may call `drop` and `finished_blocks`."""


@dataclass(slots=True)
class _Row:
    """One request of the batch that is generated."""

    request: RolloutRequest
    sampling: tuple[float, float]
    """Temperature and top-p."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: bool = False
    """Whether it has ended or was dropped."""

    def tokens(self, first: int, version: int) -> Tokens:
        """Its tokens from place `first` on."""
        return Tokens(tuple(self.ids[first:]), tuple(self.logprobs[first:]), len(self.ids), weight_version=version)


class BatchDecoder:
    """See the module; `index` is that of `RolloutRequest`.

    Args:
        model: causal LM of transformers, in eval mode. It keeps no generation settings of its folder: a repetition
            penalty there would change the distribution.
        settings: temperature and top-p of requests that bring none; `block_size` is the number of tokens that are sent
            at a time.
        eos_ids: tokens that end a response.
        tokens: the rows of the vocabulary that are tokens; no other row is drawn.
        between: see `Between`.
    """

    def __init__(
        self,
        model: Any,
        settings: DecodeSettings,
        eos_ids: Sequence[int],
        batch_size: int,
        tokens: TokenIds,
        between: Between,
    ) -> None:
        self.model, self.settings, self.eos_ids, self.batch_size = model, settings, frozenset(eos_ids), batch_size
        self.version = 0
        self._between = between
        self._tokens_only = TokensOnly(model, tokens)
        self._waiting: deque[RolloutRequest] = deque()
        self._rows: list[_Row] = []
        # No end-of-sequence tokens: the stopping rule below looks for them, and notes why a row ended.
        model.generation_config = GenerationConfig(pad_token_id=min(eos_ids), do_sample=False)

    @property
    def occupied(self) -> int:
        """Number of requests of the batch that have not ended."""
        return sum(not row.done for row in self._rows)

    @property
    def waiting(self) -> int:
        """Number of requests that begin with the next batch."""
        return len(self._waiting)

    @property
    def room(self) -> int:
        """Number of further requests that the next batch takes."""
        return self.batch_size - self.waiting

    def check(self, requests: Sequence[RolloutRequest]) -> None:
        """Refuses requests that cannot be generated.

        Raises:
            ValueError: a prompt is empty, or prompt and response do not fit into the model's context.
        """
        context = self.model.config.max_position_embeddings
        for request in requests:
            length, limit = request.prompt_ids.size, request.max_new_tokens
            if length == 0:
                raise ValueError(f"prompt {request.prompt_id} is empty; a response needs a token before it")
            if limit < 1:
                raise ValueError(f"prompt {request.prompt_id}: max_new_tokens is {limit}; it must be at least 1")
            if length + limit > context:
                raise ValueError(
                    f"prompt {request.prompt_id}: {length} prompt tokens and {limit} new tokens take {length + limit} "
                    f"positions; the model's context is {context}"
                )

    def add(self, requests: Sequence[RolloutRequest]) -> None:
        """Adds requests, which begin with the next batch. Adds none if `check` refuses one."""
        self.check(requests)
        self._waiting.extend(requests)

    def drop(self, indices: Collection[int]) -> None:
        """Drops requests, whether they wait or are being generated. A batch of dropped requests alone ends."""
        self._waiting = deque(request for request in self._waiting if request.index not in indices)
        for row in self._rows:
            row.done = row.done or row.request.index in indices

    def clear(self) -> None:
        """Drops all requests."""
        self._waiting.clear()
        self._rows = []

    def use_weights(self, version: int) -> None:
        """Notes that the model holds the weights of this version from the next batch on."""
        self.version = version

    def finished_blocks(self, sent: Mapping[int, int]) -> dict[int, Tokens]:
        """By index, the tokens behind those that were sent, of responses that have `block_size` of them.

        Args:
            sent: by index, response tokens that were sent; other requests are passed over.
        """
        return {
            row.request.index: row.tokens(sent[row.request.index], self.version)
            for row in self._rows
            if not row.done and len(row.ids) - sent.get(row.request.index, len(row.ids)) >= self.settings.block_size
        }

    @torch.inference_mode()
    def step(self, observer: Observer | None = None) -> list[Trajectory]:
        """Generates one batch of the requests that wait, to its end; `between` gets all responses, none is returned.

        Args:
            observer: is not called: there are no denoising steps.

        Raises:
            OpdlmError: the model's logits are not finite.
        """
        usual = self.settings.temperature, self.settings.top_p
        first = [self._waiting.popleft() for _ in range(min(self.batch_size, self.waiting))]
        if not first:
            return []
        self._rows = [_Row(request, request.sampling or usual) for request in first]
        ids, attended = left_padded([request.prompt_ids for request in first])
        device = input_device(self.model)
        try:
            self.model.generate(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(attended).to(device),
                max_new_tokens=max(request.max_new_tokens for request in first),
                logits_processor=LogitsProcessorList([self._tokens_only, _Draw(self._rows, device)]),
                stopping_criteria=StoppingCriteriaList([_Stop(self._rows, self._note)]),
            )
        finally:
            self._rows = []
        return []

    def _note(self) -> None:
        """Hands on the responses that the batch's newest tokens end."""
        ended = []
        for row in self._rows:
            if not row.done and (reason := self._reason(row)) is not None:
                row.done = True
                ended.append(_trajectory(row, reason, self.version))
        self._between(ended)

    def _reason(self, row: _Row) -> FinishReason | None:
        if row.ids[-1] in self.eos_ids and not self.settings.ignore_eos:
            return "eos"
        return "length" if len(row.ids) == row.request.max_new_tokens else None


class _Draw(LogitsProcessor):
    """Draws each row's next token with random numbers of the row's own seed, and leaves `generate` no choice.

    So a response depends on neither the other requests of its batch nor the global generator of torch.
    """

    def __init__(self, rows: list[_Row], device: torch.device | str) -> None:
        self._rows, self._step = rows, 0
        seeds = [as_int64(wrapped(row.request.seed)) for row in rows]
        self._seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
        self._sampled = {  # by temperature and top-p, the rows that take them
            way: torch.tensor([n for n, row in enumerate(rows) if row.sampling == way], device=device)
            for way in {row.sampling for row in rows if row.sampling[0] > 0}
        }

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores`: the logits `[B, V]` of the next token."""
        drawn, logprob = scores.argmax(dim=-1), scores.log_softmax(dim=-1)  # as `generate` takes the likeliest
        for (temperature, top_p), chosen in self._sampled.items():
            logits, uniform = scores[chosen], hashed_uniform(self._seeds[chosen], self._step)
            drawn[chosen] = draw_candidates(logits, uniform, temperature, 0, top_p)
            above = logits - logits.amax(dim=-1, keepdim=True)
            logprob[chosen] = (above / max(temperature, LOWEST_TEMPERATURE)).log_softmax(dim=-1)
        self._step += 1
        kept = logprob.gather(-1, drawn[:, None]).squeeze(-1).tolist()
        for row, token, value in zip(self._rows, drawn.tolist(), kept, strict=True):
            if not row.done:
                row.ids.append(token)
                row.logprobs.append(value)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn[:, None], 0.0) if self._sampled else scores


class _Stop(StoppingCriteria):
    """Ends the rows that are done; `generate` ends when all are.

    Args:
        note: called first; sets `done`.
    """

    def __init__(self, rows: list[_Row], note: Callable[[], None]) -> None:
        self._rows, self._note = rows, note

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """`input_ids [B, T]`: prompts and responses so far. Returns `[B]` bool: the rows that are done."""
        self._note()
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)


def _trajectory(row: _Row, reason: FinishReason, version: int) -> Trajectory:
    """The response of an ended row: every step revealed a token."""
    return Trajectory(
        index=row.request.index,
        prompt_id=row.request.prompt_id,
        prompt_ids=row.request.prompt_ids,
        response_ids=np.array(row.ids, dtype=np.int32),
        reveal_step=np.arange(1, len(row.ids) + 1, dtype=np.int32),
        response_length=len(row.ids),
        weight_version=version,
        finish_reason=reason,
        denoising_steps=len(row.ids),
        reveal_logprob=np.array(row.logprobs, dtype=np.float32),
    )
