"""Which positions of a response are masked in a training row: the states the rollout visited (METHOD.md section 4).

The last two selections are the policy gradient's (section 7): a token's loss is taken in the state that revealed it.

State k of a block (from 1) masks exactly the positions that were revealed in the block's k-th distinct step or later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from opdlm.common.grid import BlockGrid


@dataclass(frozen=True, slots=True)
class ChosenStates:
    """The states of all blocks of one training row."""

    masked: np.ndarray
    """`[R']` bool, True where a position is masked."""
    in_loss: np.ndarray
    """`[R']` bool, the masked positions at which the loss is taken."""
    weight: np.ndarray | None = None
    """`[R']` float32, how much the loss of a position counts. None: all count 1."""


Selection = Callable[["BlockStates", np.random.Generator], list[ChosenStates]]
"""Chooses states of a trajectory, one `ChosenStates` for each training row."""


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

    def all_masked_of(self, state: np.ndarray | int) -> ChosenStates:
        """A row whose loss is taken at every masked position."""
        masked = self.masked_in(state)
        return ChosenStates(masked, masked)

    def revealed_in(self, state: np.ndarray | int, weight: np.ndarray | None = None) -> ChosenStates:
        """A row whose loss is taken where the rollout's next step revealed a token."""
        masked = self.masked_in(state)
        return ChosenStates(masked, masked & ~self.masked_in(state + 1), weight)


def one_state_per_block(states: BlockStates, rng: np.random.Generator) -> list[ChosenStates]:
    """The paper's recipe: one row, in which every block has a state of its own, drawn uniformly."""
    return [states.all_masked_of(rng.integers(1, states.count + 1))]


def one_state_per_response(states: BlockStates, rng: np.random.Generator) -> list[ChosenStates]:
    """One row, in which every block is in its k-th state, with one k drawn for the whole response.

    In blocks with fewer than k states, nothing is masked.
    """
    return [states.all_masked_of(int(rng.integers(1, states.count.max() + 1)))]


def all_states(states: BlockStates, rng: np.random.Generator) -> list[ChosenStates]:
    """As many rows as the block with the most states has; in row k, every block is in its k-th state."""
    return [states.all_masked_of(k) for k in range(1, int(states.count.max()) + 1)]


def revealed(states: BlockStates, rng: np.random.Generator) -> list[ChosenStates]:
    """The rows of `all_states`, with the loss where a state's own step revealed a token: each token counts once."""
    return [states.revealed_in(k) for k in range(1, int(states.count.max()) + 1)]


def one_sampled_state(states: BlockStates, rng: np.random.Generator) -> list[ChosenStates]:
    """One row of `revealed`, each block in a state drawn uniformly, whose tokens count for those of all its states."""
    weight = states.count[states.block].astype(np.float32)
    return [states.revealed_in(rng.integers(1, states.count + 1), weight)]


def random_mask(states: BlockStates, rng: np.random.Generator) -> list[ChosenStates]:
    """OPDLM-off: one row, without regard to the visited states.

    Each block draws a mask ratio t ~ U(0, 1) and masks each position with probability t, and at least one position.
    """
    ratio = rng.random(len(states.count))
    noise = rng.random(len(states.block))
    masked = noise < ratio[states.block]
    has_none = ~np.logical_or.reduceat(masked, states.starts)
    lowest = np.minimum.reduceat(noise, states.starts)
    masked |= has_none[states.block] & (noise == lowest[states.block])
    return [ChosenStates(masked, masked)]


SELECTIONS: dict[str, Selection] = {
    "one_state_per_block": one_state_per_block,
    "one_state_per_response": one_state_per_response,
    "all_states": all_states,
    "random_mask": random_mask,
    "revealed": revealed,
    "one_sampled_state": one_sampled_state,
}
"""By their names in `objective.selection`."""
