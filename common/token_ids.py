"""Which ids of a vocabulary are tokens. A matrix may have more rows than that: it is padded to a round size.

Qwen2.5, for example, has one tokenizer and 152,064 rows at 7B, but 151,936 at 0.5B. A row that no token has takes part
in no softmax, is never drawn and is no target, so models of one tokenizer go together whatever their padding.
The module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A set of token ids: those below `end`, except `holes`. Most tokenizers leave no hole."""

    end: int
    holes: frozenset[int] = frozenset()
    """Ids below `end` that no token has; `end - 1` is none of them."""

    @classmethod
    def of(cls, ids: Iterable[int]) -> TokenIds:
        """The set of the given ids, which are 0 or more."""
        held = set(ids)
        end = max(held, default=-1) + 1
        return cls(end, frozenset(range(end)) - held if len(held) < end else frozenset())

    def __contains__(self, token: int) -> bool:
        return 0 <= token < self.end and token not in self.holes

    def __len__(self) -> int:
        return self.end - len(self.holes)

    def __iter__(self) -> Iterator[int]:
        return (i for i in range(self.end) if i not in self.holes)

    def __and__(self, other: TokenIds) -> TokenIds:
        """The ids that are in both sets."""
        if self.end == other.end and self.holes == other.holes:
            return self
        return TokenIds.of(set(self) & set(other))

    def without(self, *ids: int) -> TokenIds:
        """The set without the given ids."""
        return TokenIds.of(set(self) - set(ids)) if any(i in self for i in ids) else self

    def others(self, rows: int) -> list[int]:
        """The ids below `rows` that are not in the set, rising."""
        return [*sorted(hole for hole in self.holes if hole < rows), *range(self.end, rows)]

    def other_ranges(self, rows: int) -> list[tuple[int, int]]:
        """`others` as ranges (first id, one past the last id): a padded vocabulary has thousands in a row."""
        ranges: list[tuple[int, int]] = []
        for i in self.others(rows):
            if ranges and ranges[-1][1] == i:
                ranges[-1] = ranges[-1][0], i + 1
            else:
                ranges.append((i, i + 1))
        return ranges
