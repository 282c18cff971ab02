"""What a request's blocks in a pool need before a step writes to its positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cache_manager.block_pool import BlockId, BlockPool


class BlockSpan(NamedTuple):
    """Where a list of blocks begins, in blocks from position 0, and how many tokens each of them has."""

    first: int
    block_tokens: int


@dataclass(slots=True)
class Growth:
    """Blocks that come behind a request's blocks, and those that come in place of blocks which others have, too.

    Attributes:
        blocks: The request's; `apply` changes the list.
        replaced: Places of blocks that others have, too.
        num_added: Blocks that come behind.
        is_copied: Whether the first of the replaced blocks has rows that stay.
    """

    blocks: list[BlockId]
    replaced: list[int]
    num_added: int
    is_copied: bool

    @classmethod
    def of(
        cls,
        blocks: list[BlockId],
        *,
        span: BlockSpan,
        num_computed: int,
        num_tokens: int,
        is_shared: Callable[[BlockId], bool],
    ) -> Growth:
        """What positions num_computed .. num_tokens - 1 need to be writable."""
        first, block_tokens = span
        begin, end = num_computed // block_tokens - first, -(-num_tokens // block_tokens) - first
        num_held = len(blocks)
        replaced = [place for place in range(begin, min(end, num_held)) if is_shared(blocks[place])]
        is_copied = bool(replaced) and (first + replaced[0]) * block_tokens < num_computed
        return cls(blocks, replaced, max(0, end - num_held), is_copied)

    @property
    def num_taken(self) -> int:
        """Fresh blocks that it takes."""
        return len(self.replaced) + self.num_added

    def copy_pairs(self, taken: Sequence[BlockId]) -> tuple[list[BlockId], list[BlockId]]:
        """Source and destination of what must be copied into the fresh blocks before `apply`."""
        return ([self.blocks[self.replaced[0]]], [taken[0]]) if self.is_copied else ([], [])

    def apply(self, taken: Sequence[BlockId], pool: BlockPool) -> None:
        """Put the fresh blocks into the list, and give the replaced ones back to their pool."""
        num_replaced = len(self.replaced)
        if not num_replaced:
            self.blocks.extend(taken)
            return
        pool.free([self.blocks[place] for place in self.replaced])
        for place, block in zip(self.replaced, taken[:num_replaced], strict=True):
            self.blocks[place] = block
        self.blocks.extend(taken[num_replaced:])
