"""What the cache did, and what its blocks are used for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cache_manager.block_pool import BlockPool
from cache_manager.controller import CacheController
from cache_manager.tables import OpenTables
from cache_manager.window_tier import WindowTier


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

    @classmethod
    def of_windows(cls, tier: WindowTier) -> dict[str, TierBlocks]:
        """The blocks of window pools, by name; those that only snapshots own are evictable."""
        return {
            name: cls(pool.num_free, tier.num_evictable(name), pool.num_owned - tier.num_evictable(name))
            for name, pool in tier.pools.items()
        }


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
        device: Main blocks on the device.
        host: Main blocks on the host.
        bytes_moved: By direction.
        windows: Blocks of the window pools on the device, by pool.
        host_windows: The same on the host.
        snapshot_interval: Main blocks of a request for each of which its prefix gets a snapshot.
        num_snapshots: Snapshots on the device.
        num_host_snapshots: Snapshots on the host.
        num_evicted_snapshots: Snapshots that gave way, on both tiers.
        num_unusable_tokens: Tokens that requests were opened with and whose main blocks were cached, but which had to
            be computed, because no request could start behind them.
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
    windows: Mapping[str, TierBlocks]
    host_windows: Mapping[str, TierBlocks]
    snapshot_interval: int
    num_snapshots: int
    num_host_snapshots: int
    num_evicted_snapshots: int
    num_unusable_tokens: int

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
    tiers, windows = tables.tiers, tables.tiers.windows
    return CacheStats(
        num_tables=len(tables),
        num_queried_tokens=counts.get("queried", 0),
        num_device_hit_tokens=counts.get("device_hits", 0),
        num_host_hit_tokens=counts.get("host_hits", 0),
        num_copied_blocks=tiers.counts.num_copied,
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
        windows=TierBlocks.of_windows(windows.device),
        host_windows=TierBlocks.of_windows(windows.host),
        snapshot_interval=windows.snapshot_interval,
        num_snapshots=windows.device.num_snapshots,
        num_host_snapshots=windows.host.num_snapshots,
        num_evicted_snapshots=windows.device.num_evicted + windows.host.num_evicted,
        num_unusable_tokens=counts.get("unusable", 0),
    )
