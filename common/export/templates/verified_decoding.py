"""Verified decoding of a batch: the base model checks drafts in the forward that makes the next ones.

Let d_0 be the last token that is known, and d_1 .. d_k the k = S - 1 drafts behind it. One forward has, for S = 3:

    query     d_0 d_1 d_2 | m m m | m m m | m m m
                            behind   behind  behind
                            d_0      d_0 d_1 d_0 d_1 d_2

Clean tokens attend causally; a mask m attends to the clean tokens that its group is behind, and to its group. Drafts
are right up to the first that the base model would not have written; there its own token follows, and the group behind
the last right draft has the next drafts. Keys and values of a row lie where its tokens are, those of masks behind them,
where the next forward writes over them. This file needs torch and transformers only.
"""

from __future__ import annotations

from typing import Any

import torch

from .generation import Request, RowCache, forbidden_ids


class VerifiedDecoding:
    """Decodes the rows of one request; S is the block size, n the number of rows that have not ended.

    Args:
        model: has `mark(noisy)` and `attention_scores(seen)`.
        prefill_tokens: places of a row that go through the model at once when prompts are read.
    """

    def __init__(self, model: Any, request: Request, prefill_tokens: int) -> None:
        device = request.input_ids.device
        self._model, self._request, self._prefill_tokens = model, request, prefill_tokens
        self._size = size = model.config.block_size
        self._forbidden = forbidden_ids(model.config, device)
        places = torch.arange(size, device=device)
        self._ahead = torch.cat([places, (places[:, None] + 1 + places).flatten()])  # [Q], positions behind d_0
        self._noisy = torch.arange(len(self._ahead), device=device) >= size
        self._seen = _seen(size).to(device)  # [Q, Q]
        self._begin = torch.tensor([len(prompt) for prompt in request.prompts], device=device)  # [n]
        self._end = self._begin + request.max_new_tokens
        self._start = self._begin - 1  # [n], place of d_0
        self._index = torch.arange(len(self._begin), device=device)  # [n], row of the request
        mask_id, width = model.config.mask_token_id, int(self._end.max()) + 2 * size
        self._tokens = request.input_ids.new_full((len(self._begin), width), mask_id)
        for row, prompt in enumerate(request.prompts):
            self._tokens[row, : len(prompt)] = prompt
        self._drawn_from: torch.Tensor | None = None  # [n, S - 1, V], where drafts are sampled
        self._cache = RowCache()

    def run(self) -> torch.Tensor:
        """Decodes all rows; returns `[B, P + R]` int64 (`Request.sequences`)."""
        try:
            return self._run()
        finally:
            self._model.mark(None)

    def _run(self) -> torch.Tensor:
        responses: list[torch.Tensor] = [self._tokens[:0, 0]] * len(self._index)
        last = int(self._start.max())
        for first in range(0, last, self._prefill_tokens):
            places = torch.arange(first, min(first + self._prefill_tokens, last), device=self._tokens.device)
            places = places.expand(len(self._index), -1)
            seen = torch.arange(int(places.max()) + 1, device=places.device) <= places[..., None]
            self._forward(self._tokens.gather(1, places), places, places, seen, None)
        size, ahead = self._size, torch.arange(self._size, device=self._tokens.device)
        while len(self._index):
            clean = self._tokens.gather(1, self._start[:, None] + ahead)  # [n, S]
            hidden = self._step(clean)
            right, own = self._verify(clean, self._logits(hidden[:, :size]))
            known = self._start + 1 + right  # [n], place of the token of its own
            group = size + right[:, None] * size + ahead[:-1]  # [n, S - 1], queries that predict the next drafts
            drafts = self._draft(self._logits(hidden.gather(1, group[..., None].expand(-1, -1, hidden.shape[-1]))))
            self._tokens.scatter_(1, known[:, None], own[:, None])
            self._tokens.scatter_(1, known[:, None] + 1 + ahead[:-1], drafts)
            window = self._start[:, None] + 1 + ahead
            new = torch.isin(self._tokens.gather(1, window), self._request.eos_ids) & (window <= known[:, None])
            self._start = known
            finished = (new.any(1) | (known + 1 >= self._end)).cpu()
            if finished.any():
                for row in finished.nonzero()[:, 0].tolist():
                    response = self._tokens[row, self._begin[row] : known[row] + 1]
                    responses[int(self._index[row])] = self._request.cut(response)
                self._keep((~finished).nonzero()[:, 0].to(self._tokens.device))
        return self._request.sequences(responses)

    def _keep(self, rows: torch.Tensor) -> None:
        """Drops all rows but these, `[n]` int64."""
        for name in ("_tokens", "_begin", "_end", "_start", "_index"):
            setattr(self, name, getattr(self, name)[rows])
        self._drawn_from = None if self._drawn_from is None else self._drawn_from[rows]
        self._cache.keep(rows)

    def _step(self, clean: torch.Tensor) -> torch.Tensor:
        """Hidden states `[n, Q, D]` of the clean tokens `[n, S]` and of a group of masks behind each of them."""
        n, queries = len(clean), len(self._ahead)
        places = self._start[:, None] + torch.arange(queries, device=clean.device)
        step = torch.arange(int(places.max()) + 1, device=clean.device) - self._start[:, None]  # [n, K]
        inside = (step >= 0) & (step < queries)
        seen = self._seen[step.clamp(0, queries - 1)].transpose(1, 2)  # [n, Q, K]
        seen = torch.where(inside[:, None], seen, (step < 0)[:, None])
        masks = clean.new_full((n, queries - self._size), self._model.config.mask_token_id)
        ids, positions = torch.cat([clean, masks], dim=1), self._start[:, None] + self._ahead
        return self._forward(ids, places, positions, seen, self._noisy.expand(n, -1))

    def _forward(
        self,
        ids: torch.Tensor,
        places: torch.Tensor,
        positions: torch.Tensor,
        seen: torch.Tensor,
        noisy: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states `[n, Q, D]` of tokens `[n, Q]`; writes their keys and values at `[n, Q]` places."""
        self._cache.prepare(places, seen.shape[2])
        self._model.mark(noisy)
        output = self._model.model(
            input_ids=ids,
            attention_mask=self._model.attention_scores(seen[:, None]),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=False,
        )
        return output.last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, m, V]` float32, minus infinity for what is never drawn."""
        # Flat: a slice of three dimensions makes a bfloat16 product on a CPU twenty times as slow.
        logits = self._model.lm_head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]).float()
        logits[..., self._forbidden] = float("-inf")
        return logits

    def _verify(self, clean: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many drafts are right, `[n]`, and the base model's own token behind them, `[n]`, both int64.

        Above temperature 0 a draft d that was drawn from q is right with probability min(1, p(d) / q(d)), and the token
        behind the last right one is drawn from what p has more than q.
        """
        if self._request.warpers is None:
            own = logits.argmax(-1)
            right = (clean[:, 1:] == own[:, :-1]).long().cumprod(1).sum(1)
            return right, own.gather(1, right[:, None])[:, 0]
        p = self._distribution(logits)
        q = torch.zeros_like(p[:, :-1]) if self._drawn_from is None else self._drawn_from  # at first there is no draft
        drafts = clean[:, 1:, None]
        chance = torch.rand(drafts.shape[:2], device=p.device)
        accepted = chance * q.gather(2, drafts)[..., 0] < p[:, :-1].gather(2, drafts)[..., 0]
        right = accepted.long().cumprod(1).sum(1)
        at = right[:, None, None].expand(-1, 1, p.shape[2])
        p, q = p.gather(1, at)[:, 0], torch.cat([q, torch.zeros_like(p[:, :1])], dim=1).gather(1, at)[:, 0]
        more = (p - q).clamp(min=0)
        more = torch.where(more.sum(1, keepdim=True) > 0, more, p)  # they differ by rounding only
        return right, torch.multinomial(more, 1)[:, 0]

    def _draft(self, logits: torch.Tensor) -> torch.Tensor:
        """The next drafts `[n, S - 1]` int64 of logits `[n, S - 1, V]`."""
        if self._request.warpers is None:
            return logits.argmax(-1)
        q = self._drawn_from = self._distribution(logits)
        if not q.shape[1]:  # blocks of one token have no drafts
            return self._tokens[:, :0]
        return torch.multinomial(q.flatten(0, 1), 1).view(q.shape[:2])

    def _distribution(self, logits: torch.Tensor) -> torch.Tensor:
        return self._request.probabilities(logits.flatten(0, 1)).view(logits.shape)


def _seen(size: int) -> torch.Tensor:
    """`[Q, Q]` bool, True where the key (dim 0) is seen by the query (dim 1), both of one step."""
    places = torch.arange(size)
    group = torch.cat([torch.full((size,), -1), places.repeat_interleave(size)])  # -1: clean
    clean = torch.cat([places, torch.full((size * size,), size)])
    reach = torch.where(group < 0, clean, group)  # the last clean token that a query sees
    is_clean = group < 0
    return (is_clean[:, None] & (clean[:, None] <= reach)) | (~is_clean[:, None] & (group[:, None] == group))
