"""Which positions of a response are masked in a training row: the states the rollout visited (METHOD.md section 4).

State k of a block (from 1) masks exactly the positions that were revealed in the block's k-th distinct step or later.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from opdlm.common.grid import BlockGrid

Selection = Callable[["BlockStates", np.random.Generator], list[np.ndarray]]
"""Chooses states of a trajectory: one `[R']` bool array for each training row, True where a position is masked."""


class BlockStates:
    """The visited states of one trajectory, block by block."""

    def __init__(self, reveal_step: np.ndarray, prompt_length: int, grid: BlockGrid) -> None:
        """Sorts the reveal steps of each block.

        Args:
            reveal_step: `[R']` int, denoising step at which each kept response token was revealed.
            prompt_length: tokens of the prompt.
        """
        positions = prompt_length + np.arange(len(reveal_step))
        blocks = (positions + grid.offset(prompt_length)) // grid.block_size
        self.block = blocks - blocks[0]
        """`[R']` block of each token, counted from the first response block."""
        self.starts = np.flatnonzero(np.diff(self.block, prepend=-1))
        """`[blocks]` index of each block's first token."""
        order = np.lexsort((reveal_step, self.block))
        is_new_step = np.diff(reveal_step[order], prepend=0) != 0
        is_new_step[self.starts] = True  # sorting leaves every block where it was
        self.count = np.add.reduceat(is_new_step.astype(np.int64), self.starts)
        """`[blocks]` number of states of each block."""
        self.rank = np.empty(len(reveal_step), dtype=np.int64)
        """`[R']` place of the token's reveal step among its block's distinct steps, from 1."""
        self.rank[order] = is_new_step.cumsum() - (self.count.cumsum() - self.count)[self.block]

    def masked_in(self, state: np.ndarray | int) -> np.ndarray:
        """`[R']` bool, True where a position is masked. `state`: of every block, or `[blocks]`, one per block."""
        return self.rank >= (state if isinstance(state, int) else state[self.block])


def one_state_per_block(states: BlockStates, rng: np.random.Generator) -> list[np.ndarray]:
    """The paper's recipe: one row, in which every block has a state of its own, drawn uniformly."""
    return [states.masked_in(rng.integers(1, states.count + 1))]


def one_state_per_response(states: BlockStates, rng: np.random.Generator) -> list[np.ndarray]:
    """One row, in which every block is in its k-th state, with one k drawn for the whole response.

    In blocks with fewer than k states, nothing is masked.
    """
    return [states.masked_in(int(rng.integers(1, states.count.max() + 1)))]


def all_states(states: BlockStates, rng: np.random.Generator) -> list[np.ndarray]:
    """As many rows as the block with the most states has; in row k, every block is in its k-th state."""
    return [states.masked_in(k) for k in range(1, int(states.count.max()) + 1)]


def random_mask(states: BlockStates, rng: np.random.Generator) -> list[np.ndarray]:
    """OPDLM-off: one row, without regard to the visited states.

    Each block draws a mask ratio t ~ U(0, 1) and masks each position with probability t, and at least one position.
    """
    ratio = rng.random(len(states.count))
    noise = rng.random(len(states.block))
    masked = noise < ratio[states.block]
    has_none = ~np.logical_or.reduceat(masked, states.starts)
    lowest = np.minimum.reduceat(noise, states.starts)
    masked |= has_none[states.block] & (noise == lowest[states.block])
    return [masked]


SELECTIONS: dict[str, Selection] = {
    "one_state_per_block": one_state_per_block,
    "one_state_per_response": one_state_per_response,
    "all_states": all_states,
    "random_mask": random_mask,
}
"""By their names in `objective.selection`."""
