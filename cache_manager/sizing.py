"""How many blocks window pools need: no request waits for them, and prefixes have room for snapshots."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cache_manager.spec import MAIN_POOL, CachePool, CacheTensorSpec

SNAPSHOT_BLOCKS = 16
"""Main blocks for each of which there is room for one snapshot in the window pools."""


@dataclass(frozen=True)
class WindowRoom:
    """What requests hold in window pools at the same time.

    Attributes:
        num_requests: On the device.
        num_step_tokens: Positions that a step may write, over all requests.
        num_lag_tokens: Confirmed tokens of each request behind the last that is complete in every group.
        has_snapshots: Whether prefixes are cached.
    """

    num_requests: int
    num_step_tokens: int
    num_lag_tokens: int = 0
    has_snapshots: bool = True

    def needed(self, pool: CachePool) -> int:
        """Blocks of a pool with which no request ever waits."""
        return pool.blocks_of_requests(
            self.num_requests, self.num_step_tokens + self.num_requests * self.num_lag_tokens
        )

    def device_blocks(self, pools: Iterable[CachePool], num_blocks: int) -> dict[str, int]:
        """Blocks of each pool on a device with so many main blocks."""
        num_snapshots = self._num_snapshots(num_blocks)
        return {pool.name: self.needed(pool) + num_snapshots * pool.boundary_blocks for pool in pools}

    def host_blocks(self, pools: Iterable[CachePool], num_blocks: int) -> dict[str, int]:
        """Blocks of each pool on a host with so many main blocks: for snapshots, and for as many requests."""
        num_requests = min(self.num_requests, _num_groups(num_blocks))
        num_snapshots = self._num_snapshots(num_blocks)
        return {
            pool.name: max(1, pool.blocks_of_requests(num_requests, num_requests * self.num_lag_tokens))
            + num_snapshots * pool.boundary_blocks
            for pool in pools
        }

    def _num_snapshots(self, num_blocks: int) -> int:
        return _num_groups(num_blocks) if self.has_snapshots else 0


def cache_bytes(specs: Iterable[CacheTensorSpec], num_blocks: int, window_blocks: Mapping[str, int]) -> int:
    """Bytes of the tensors of specs with so many blocks in the main pool and in the others."""
    counts = {MAIN_POOL: num_blocks, **window_blocks}
    return sum(spec.bytes_per_block_all_layers * counts[spec.pool] for spec in specs)


def most_blocks(memory_bytes: int, limit: int, bytes_of: Callable[[int], int]) -> int:
    """The most main blocks up to a limit whose cache takes no more than so many bytes; 0 if not even one does.

    Args:
        memory_bytes: What there is.
        limit: 0 or more.
        bytes_of: Main blocks to bytes; grows.
    """
    return bisect_right(range(1, limit + 1), memory_bytes, key=bytes_of)


def _num_groups(num_blocks: int) -> int:
    return -(-num_blocks // SNAPSHOT_BLOCKS)
