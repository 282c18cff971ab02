"""Who owns which block of one tier.

A block is in one of three states:

    free        nobody owns it and its bytes mean nothing
    evictable   nobody owns it, but its bytes are cached: it can be shared again, or be forgotten
    owned       by one owner or more; its bytes may be cached too

    allocate: free -> owned          share: evictable, owned -> owned         cache: owned, now with cached bytes
    free: owned -> free, or evictable if its bytes are cached                 uncache: evictable -> free
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NewType

from cache_manager.errors import CacheInUse, OutOfBlocks, UnknownBlock

BlockId = NewType("BlockId", int)


class BlockPool:
    """A fixed number of blocks with reference counts. Every call takes constant time per block, all or none.

    Free blocks are handed out last-in first-out: the bytes of a block that was freed a moment ago are most likely
    still in a processor cache. Evictable blocks wait in the order in which they lost their last owner; of one call to
    `free` the last block waits in front, so that the blocks of a prefix go from its end. The queue is an OrderedDict
    and not a deque, because a prefix hit takes a block out of the middle.
    """

    __slots__ = ("_evictable", "_free", "_is_cached", "_num_owners")

    def __init__(self, num_blocks: int) -> None:
        """Make a pool of free blocks 0 .. num_blocks - 1.

        Raises:
            ValueError: num_blocks is below 1.
        """
        if num_blocks < 1:
            raise ValueError(f"num_blocks: expected 1 or more, got {num_blocks}")
        self._free = [BlockId(block) for block in range(num_blocks - 1, -1, -1)]
        self._num_owners = [0] * num_blocks
        self._is_cached = bytearray(num_blocks)
        self._evictable: OrderedDict[BlockId, None] = OrderedDict()

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return len(self._num_owners)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Blocks that nobody owns but whose bytes are cached."""
        return len(self._evictable)

    @property
    def num_owned(self) -> int:
        """Blocks with an owner."""
        return len(self._num_owners) - len(self._free) - len(self._evictable)

    def num_owners(self, block: BlockId) -> int:
        """Reference count of a block.

        Raises:
            UnknownBlock: The pool does not have it.
        """
        self._require(block)
        return self._num_owners[block]

    def is_cached(self, block: BlockId) -> bool:
        """Whether its bytes are cached, owned or not.

        Raises:
            UnknownBlock: The pool does not have it.
        """
        self._require(block)
        return bool(self._is_cached[block])

    def least_recently_used(self, count: int) -> list[BlockId]:
        """The first evictable blocks, at most count, in the order in which they should go."""
        return list(islice(self._evictable, count))

    def allocate(self, count: int) -> list[BlockId]:
        """Take free blocks, each with one owner.

        Raises:
            ValueError: count is negative.
            OutOfBlocks: Fewer than count blocks are free.
        """
        free = self._free
        if count > len(free):
            raise OutOfBlocks(f"{count} blocks asked for, {len(free)} of {self.num_blocks} are free")
        if count <= 0:
            if count == 0:
                return []
            raise ValueError(f"count: expected 0 or more, got {count}")
        blocks = free[: -count - 1 : -1]
        del free[-count:]
        num_owners = self._num_owners
        for block in blocks:
            num_owners[block] = 1
        return blocks

    def share(self, blocks: Iterable[BlockId]) -> None:
        """Give each block one more owner.

        Raises:
            UnknownBlock: A block is not of this pool, free, or named twice.
        """
        shared = list(blocks)
        for block in shared:
            self._require(block)
            if not self._num_owners[block] and not self._is_cached[block]:
                raise UnknownBlock(f"block {block} is neither owned nor cached")
        self._require_distinct(shared)
        for block in shared:
            if not self._num_owners[block]:
                del self._evictable[block]
            self._num_owners[block] += 1

    def free(self, blocks: Iterable[BlockId]) -> None:
        """Take one owner away from each block.

        Raises:
            UnknownBlock: A block is not of this pool, not in use, or named twice.
        """
        returned = list(blocks)
        num_owners, num_blocks = self._num_owners, len(self._num_owners)
        for block in returned:
            if not 0 <= block < num_blocks or not num_owners[block]:
                self._require(block)
                raise UnknownBlock(f"block {block} is not in use")
        if len(returned) > 1:
            self._require_distinct(returned)
            returned.reverse()
        for block in returned:
            num_owners[block] -= 1
            if not num_owners[block]:
                if self._is_cached[block]:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def cache(self, block: BlockId) -> None:
        """Keep the bytes of an owned block after its last owner has gone.

        Raises:
            UnknownBlock: The block is not in use, or cached already.
        """
        self._require(block)
        if not self._num_owners[block] or self._is_cached[block]:
            raise UnknownBlock(f"block {block} is {'cached already' if self._is_cached[block] else 'not in use'}")
        self._is_cached[block] = 1

    def uncache(self, block: BlockId) -> None:
        """Forget what a block's bytes mean; without an owner it is free then.

        Raises:
            UnknownBlock: The block is not cached.
        """
        self._require(block)
        if not self._is_cached[block]:
            raise UnknownBlock(f"block {block} is not cached")
        self._is_cached[block] = 0
        if not self._num_owners[block]:
            del self._evictable[block]
            self._free.append(block)

    def touch(self, block: BlockId) -> None:
        """Move a block to the end of the eviction queue, if it is in it."""
        if block in self._evictable:
            self._evictable.move_to_end(block)

    def resize(self, num_blocks: int) -> None:
        """Change the number of blocks at the upper end.

        Raises:
            ValueError: num_blocks is below 1.
            CacheInUse: A block beyond the new size is owned or cached.
        """
        if num_blocks < 1:
            raise ValueError(f"num_blocks: expected 1 or more, got {num_blocks}")
        before = self.num_blocks
        used = [block for block in range(num_blocks, before) if self._num_owners[block] or self._is_cached[block]]
        if used:
            raise CacheInUse(f"num_blocks: expected {used[-1] + 1} or more while block {used[-1]} is used")
        del self._num_owners[num_blocks:]
        del self._is_cached[num_blocks:]
        added = max(0, num_blocks - before)
        self._num_owners += [0] * added
        self._is_cached += bytes(added)
        kept = [block for block in self._free if block < num_blocks]
        self._free = [BlockId(block) for block in range(num_blocks - 1, before - 1, -1)] + kept

    def check_integrity(self, owners: Mapping[BlockId, int] | None = None) -> None:
        """Check that every block is free, evictable or owned, exactly once.

        Args:
            owners: How many owners each block has by the books of those owners; None: not compared.

        Raises:
            AssertionError: The books differ; no caller of this class can cause that.
        """
        free, evictable, blocks = set(self._free), set(self._evictable), range(self.num_blocks)
        owned = {block for block in blocks if self._num_owners[block]}
        laws = {
            "a block is on the free list twice": len(free) == len(self._free),
            "a foreign block is free or evictable": free | evictable <= set(blocks),
            "a block in use is on the free list": not owned & free,
            "a block in use is evictable": not owned & evictable,
            "a block is free and evictable": not free & evictable,
            "a block is neither free nor in use": len(free) + len(evictable) + len(owned) == self.num_blocks,
            "a reference count is negative": min(self._num_owners) >= 0,
            "an evictable block is not cached": all(self._is_cached[block] for block in evictable),
            "a free block is cached": not any(self._is_cached[block] for block in free),
        }
        if owners is not None:
            counts = {block: self._num_owners[block] for block in owned}
            laws[f"reference counts {counts} differ from owners {dict(owners)}"] = counts == dict(owners)
        for broken, holds in laws.items():
            if not holds:
                raise AssertionError(broken)

    def _require(self, block: BlockId) -> None:
        if not 0 <= block < len(self._num_owners):
            raise UnknownBlock(f"block {block} is not one of the pool's {self.num_blocks}")

    @staticmethod
    def _require_distinct(blocks: list[BlockId]) -> None:
        if len(set(blocks)) != len(blocks):
            raise UnknownBlock(f"a block is named twice in {blocks}")
