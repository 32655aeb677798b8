"""Which positions of a response are masked in a training row: the states the rollout visited (METHOD.md section 4).

Within a block, state k (from 1) masks exactly the positions revealed in the block's k-th distinct step or later.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from opdlm.common.grid import BlockGrid

Selection = Callable[["BlockStates", np.random.Generator], list[np.ndarray]]


class BlockStates:
    """The visited states of one trajectory, block by block."""

    def __init__(self, reveal_step: np.ndarray, prompt_length: int, grid: BlockGrid) -> None:
        """Args: `reveal_step`: `[R']` int, denoising step of each kept response token."""
        positions = prompt_length + np.arange(len(reveal_step))
        blocks = (positions + grid.offset(prompt_length)) // grid.block_size
        self.block = blocks - blocks[0]
        """`[R']` block of each token, counted from the first response block."""
        self.starts = np.flatnonzero(np.diff(self.block, prepend=-1))
        """`[blocks]` index of each block's first token."""
        order = np.lexsort((reveal_step, self.block))
        begins = np.diff(reveal_step[order], prepend=0) != 0
        begins[self.starts] = True  # the blocks are in order, before and after
        self.count = np.add.reduceat(begins.astype(np.int64), self.starts)
        """`[blocks]` number of states of each block."""
        self.rank = np.empty(len(reveal_step), dtype=np.int64)
        """`[R']` place of the token's reveal step among its block's distinct steps, from 1."""
        self.rank[order] = begins.cumsum() - (self.count.cumsum() - self.count)[self.block]

    def masked_in(self, state: np.ndarray | int) -> np.ndarray:
        """`[R']` bool: masked where the block is in the given state (one number, or one a block)."""
        return self.rank >= (state if isinstance(state, int) else state[self.block])


def one_state_per_block(states: BlockStates, rng: np.random.Generator) -> list[np.ndarray]:
    """The paper's recipe: every block in a state of its own, drawn uniformly."""
    return [states.masked_in(rng.integers(1, states.count + 1))]


def one_state_per_response(states: BlockStates, rng: np.random.Generator) -> list[np.ndarray]:
    """One index k for the whole response; blocks with fewer states than k have nothing masked."""
    return [states.masked_in(int(rng.integers(1, states.count.max() + 1)))]


def all_states(states: BlockStates, rng: np.random.Generator) -> list[np.ndarray]:
    """Row k has every block in its k-th state."""
    return [states.masked_in(k) for k in range(1, int(states.count.max()) + 1)]


def random_mask(states: BlockStates, rng: np.random.Generator) -> list[np.ndarray]:
    """OPDLM-off: a mask ratio t ~ U(0, 1) per block, each position masked with probability t, at least one."""
    ratio = rng.random(len(states.count))
    noise = rng.random(len(states.block))
    masked = noise < ratio[states.block]
    none = ~np.logical_or.reduceat(masked, states.starts)
    lowest = np.minimum.reduceat(noise, states.starts)
    masked |= none[states.block] & (noise == lowest[states.block])
    return [masked]


SELECTIONS: dict[str, Selection] = {
    "one_state_per_block": one_state_per_block,
    "one_state_per_response": one_state_per_response,
    "all_states": all_states,
    "random_mask": random_mask,
}
