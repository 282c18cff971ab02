"""What the cache did, and what its blocks are used for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cache_manager.block_pool import BlockPool
from cache_manager.controller import CacheController
from cache_manager.tables import OpenTables


@dataclass(frozen=True)
class TierBlocks:
    """Blocks of one tier by state; the three add up to all of them."""

    num_free: int
    num_evictable: int
    num_owned: int

    @classmethod
    def of(cls, pool: BlockPool) -> TierBlocks:
        """The blocks of a pool."""
        return cls(pool.num_free, pool.num_evictable, pool.num_owned)


@dataclass(frozen=True)
class CacheStats:
    """Counters since the start, and the blocks by state.

    Attributes:
        num_tables: Open tables.
        num_queried_tokens: Tokens that requests were opened with.
        num_device_hit_tokens: Those whose entries were found on the device.
        num_host_hit_tokens: Those whose entries were found on the host.
        num_copied_blocks: Copied because a shared block was to be extended.
        num_swapped_out_blocks: Of requests that were moved to the host.
        num_swapped_in_blocks: Loaded for requests that came back.
        num_evicted_blocks: Cached blocks that left the device.
        num_lost_blocks: Cached blocks that left the last tier.
        num_backed_up_blocks: Cached blocks that were copied to the host.
        num_failed_backups: Blocks for which that failed or took too long.
        num_failed_loads: Loads that failed and were undone.
        last_failure: Why the latest backup failed.
        device: Blocks on the device.
        host: Blocks on the host.
        bytes_moved: By direction.
    """

    num_tables: int
    num_queried_tokens: int
    num_device_hit_tokens: int
    num_host_hit_tokens: int
    num_copied_blocks: int
    num_swapped_out_blocks: int
    num_swapped_in_blocks: int
    num_evicted_blocks: int
    num_lost_blocks: int
    num_backed_up_blocks: int
    num_failed_backups: int
    num_failed_loads: int
    last_failure: str | None
    device: TierBlocks
    host: TierBlocks
    bytes_moved: Mapping[str, int]

    @property
    def hit_rate(self) -> float:
        """Share of queried tokens that were found; 0 without queries."""
        hits = self.num_device_hit_tokens + self.num_host_hit_tokens
        return hits / self.num_queried_tokens if self.num_queried_tokens else 0.0


def collect_stats(tables: OpenTables, counts: Mapping[str, int], controller: CacheController) -> CacheStats:
    """As CacheManager.stats.

    Args:
        tables: The open tables.
        counts: What the manager counted; what is missing is 0.
        controller: Counts the bytes.
    """
    tiers = tables.tiers
    return CacheStats(
        num_tables=len(tables),
        num_queried_tokens=counts.get("queried", 0),
        num_device_hit_tokens=counts.get("device_hits", 0),
        num_host_hit_tokens=counts.get("host_hits", 0),
        num_copied_blocks=counts.get("copied", 0),
        num_swapped_out_blocks=counts.get("swapped_out", 0),
        num_swapped_in_blocks=counts.get("swapped_in", 0),
        num_evicted_blocks=tiers.counts.num_evicted,
        num_lost_blocks=tiers.counts.num_lost,
        num_backed_up_blocks=tiers.counts.num_backed_up,
        num_failed_backups=tiers.counts.num_failed_backups,
        num_failed_loads=tables.loads.num_failed,
        last_failure=None if tiers.last_failure is None else str(tiers.last_failure),
        device=TierBlocks.of(tiers.device),
        host=TierBlocks.of(tiers.host) if tiers.has_host else TierBlocks(0, 0, 0),
        bytes_moved=controller.get_stats()["bytes_moved"],
    )
