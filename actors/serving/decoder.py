"""A block decoder whose sequences can be read while they are decoded, and dropped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.observation import Step
from opdlm.common.tensors import tensor_to_array


@dataclass(frozen=True, slots=True)
class Tokens:
    """Further tokens of one response, which do not change any more."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    """Log-probability of each token when it was revealed. None: the decoder keeps none (strategy `verified`)."""
    denoising_steps: int
    """Of the whole response so far."""
    end: str | None = None
    """Why the response ended; None: it goes on."""
    weight_version: int = 0
    step: Step | None = None
    """One denoising step of a watched request, in a part of its own: then there are no ids, and it goes on."""


class ServedDecoder(BlockDecoder):
    """See `BlockDecoder`. `index` is that of `RolloutRequest`."""

    def drop(self, indices: Collection[int]) -> None:
        """Drops requests, whether they wait or are being decoded, and frees their slots. Others are not touched."""
        for request in [waiting for waiting in self._waiting if waiting.index in indices]:
            self._waiting.remove(request)
        rows = [row for row, request in enumerate(self._slots.requests) if request.index in indices]
        if rows:
            self._slots.free(rows)
            self._crowded = False

    def finished_blocks(self, sent: Mapping[int, int]) -> dict[int, Tokens]:
        """By index, the tokens of finished blocks behind those that were sent.

        Args:
            sent: by index, response tokens that were sent; other sequences are passed over. A sequence that is put back
                and decoded anew sends nothing until it is further than it was.
        """
        slots, found = self._slots, {}
        for row, request in enumerate(slots.requests):
            if request.index not in sent:
                continue
            first = request.prompt_ids.size + sent[request.index]
            last = min(int(slots.host_starts[row]), request.prompt_ids.size + request.max_new_tokens)
            if last > first:
                kept = tensor_to_array(slots.noted[row, first:last]).tolist() if self.settings.keep_logprobs else None
                found[request.index] = Tokens(
                    tuple(slots.tokens[row, first:last].tolist()),
                    None if kept is None else tuple(kept),
                    int(slots.reveal[row, first:last].max()),
                    weight_version=slots.version,
                )
        return found
