"""What of a request's tokens is cached, and what the rest costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cache_manager.prefix_tree import PrefixNode, Tier
from cache_manager.tiers import CacheTiers

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class PrefixMatch:
    """What `CacheManager.open` would find now.

    Attributes:
        path: Cached blocks it would use.
        num_known: Tokens it was asked about.
        num_tokens: Leading tokens that need not be computed; at most all but the last, whose logits are wanted.
        num_host_tokens: Those of them that would be loaded from the host.
        num_unusable_tokens: Leading tokens behind those, which are cached but must be computed: a request cannot start
            behind them, because the window pools lack the rows before, or because no token would be left to compute.
        num_blocks: Blocks the table would have.
        num_blocks_needed: How many of num_available it needs.
        fits: Whether so many are available.
    """

    path: tuple[PrefixNode, ...]
    num_known: int
    num_tokens: int
    num_host_tokens: int
    num_unusable_tokens: int
    num_blocks: int
    num_blocks_needed: int
    fits: bool

    @property
    def num_device_blocks(self) -> int:
        """Blocks of the path that are on the device; the others follow them and are on the host."""
        return sum(node.blocks[Tier.DEVICE] is not None for node in self.path)


def find_match(
    tiers: CacheTiers, tokens: npt.ArrayLike, num_tokens: int | None, salt: bytes, *, is_prefix_cached: bool
) -> PrefixMatch:
    """As CacheManager.match."""
    num_known = len(np.asarray(tokens))
    if num_known == 0:
        raise ValueError("tokens: expected 1 or more, got 0")
    if num_tokens is not None and num_tokens < num_known:
        raise ValueError(f"num_tokens: expected {num_known} or more, got {num_tokens}")
    path = tiers.tree.match(tokens, salt) if is_prefix_cached else []
    num_cached = len(path)
    num_blocks = tiers.num_blocks_of(num_tokens or num_known)
    if tiers.windows.pools:
        while path and (len(path) * tiers.block_size == num_known or not tiers.windows.can_start(path[-1])):
            path.pop()
    num_needed = num_blocks_needed(tiers, path, num_blocks)
    if path and len(path) * tiers.block_size == num_known:
        # The last token is computed again, and its block is cached: it is written to in a copy, which takes one more
        # block. Without room for it, or with a load before it, computing the block again is the simpler way.
        num_needed += 1
        if num_needed > tiers.num_available or path[-1].blocks[Tier.DEVICE] is None:
            path.pop()
            num_needed = num_blocks_needed(tiers, path, num_blocks)
    num_hits = min(len(path) * tiers.block_size, num_known - 1)
    num_on_host = sum(node.blocks[Tier.DEVICE] is None for node in path)
    return PrefixMatch(
        path=tuple(path),
        num_known=num_known,
        num_tokens=num_hits,
        num_host_tokens=num_on_host * tiers.block_size,
        num_unusable_tokens=(num_cached - len(path)) * tiers.block_size,
        num_blocks=num_blocks,
        num_blocks_needed=num_needed,
        fits=num_needed <= tiers.num_available,
    )


def num_blocks_needed(tiers: CacheTiers, path: Sequence[PrefixNode], num_blocks: int) -> int:
    """Available blocks that a table of num_blocks takes if it starts with the path; a hit with an owner is free."""
    on_device = [block for node in path if (block := node.blocks[Tier.DEVICE]) is not None]
    return num_blocks - sum(tiers.device.num_owners(block) > 0 for block in on_device)
