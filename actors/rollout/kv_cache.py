"""Key/value cache of an actor: positions that the sequences of all slots share.

Each layer has one long row of positions, and each slot a place in it, which `places.py` chooses and moves. So a slot
costs what its sequence has, not what the longest one may get.

A forward writes the keys and values of its tokens at the tokens' own positions before it reads any of them. So the
entries of a noisy block are overwritten by the clean ones when the block is committed, and old entries at positions
that are not decoded yet are overwritten before a mask lets a token attend to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from opdlm.common.model.config import head_width

SPARE = 16
"""Positions of each layer that belong to no slot: the first takes what nobody reads, and windows may reach into all."""


class SlotCache:
    """Keys and values, given to transformers as `past_key_values` (a forward calls only `update`).

    Decoders may share a cache: see `user`.
    """

    def __init__(self, model: Any, limit: int | None = None) -> None:
        """Allocates the cache.

        Args:
            model: causal LM of transformers, whose dtype and device the cache has.
            limit: positions (`rollout.cache_tokens`); they are allocated now. None: the cache grows with its sequences.
        """
        config, weight = model.config, model.lm_head.weight
        empty = weight.new_zeros(0, config.num_key_value_heads, head_width(config))
        self.layers = [[empty, empty] for _ in range(config.num_hidden_layers)]
        """Per layer, keys and values, `[positions + SPARE, H', D]` each."""
        self.limit, self.positions = limit, 0
        self.user: object = None
        """The decoder that wrote last; what others had written is gone."""
        self._written: torch.Tensor
        self._attends_to_cache = False
        if limit is not None:
            self.enlarge(limit)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def enlarge(self, positions: int) -> None:
        """Makes room for more positions; what is written stays. Copies one tensor at a time, to need little memory."""
        for layer in self.layers:
            for i, old in enumerate(layer):
                layer[i] = old.new_zeros(positions + SPARE, *old.shape[1:])
                layer[i][: self.positions] = old[: self.positions]
        self.positions = positions

    def clear(self) -> None:
        """Forgets all: what is hidden by a mask counts 0 times, but 0 times NaN is NaN."""
        for layer in self.layers:
            for tensor in layer:
                tensor.zero_()

    def move(self, old: np.ndarray, new: np.ndarray, lengths: np.ndarray) -> None:
        """Moves stretches of positions, as if all at once. Copies one tensor at a time, to need little memory.

        Args:
            old, new: `[n]` int64, where each stretch begins, and where it is to begin.
            lengths: `[n]` int64, its positions.
        """
        lengths = np.where(old == new, 0, lengths)
        if not lengths.any():
            return
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        device = self.layers[0][0].device
        source, target = (torch.from_numpy(np.repeat(begins, lengths) + within).to(device) for begins in (old, new))
        for layer in self.layers:
            for tensor in layer:
                tensor.index_copy_(0, target, tensor.index_select(0, source))

    def prepare(self, written: torch.Tensor, attends_to_cache: bool) -> None:
        """Sets where the next forward writes and what it attends to.

        Args:
            written: `[n, Q]` int64, the place of each token in the cache; what is beyond it goes to a spare position.
            attends_to_cache: False: attend to the keys of the batch itself; in a prefill there are no others.
        """
        self._written, self._attends_to_cache = written.clamp(max=self.positions), attends_to_cache

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values, `[n, H', Q, D]` each, into one layer.

        Returns: the keys and values to attend to: the given ones, or those of the whole layer, `[positions, H', D]`.
        """
        for tensor, new in zip(self.layers[layer], (keys, values), strict=True):
            tensor[self._written] = new.transpose(1, 2)
        if self._attends_to_cache:
            return self.layers[layer][0], self.layers[layer][1]
        return keys, values
