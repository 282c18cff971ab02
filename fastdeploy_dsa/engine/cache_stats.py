"""What the cache did for the engine's requests."""

from __future__ import annotations

from dataclasses import dataclass

from cache_manager import CacheStats, TierBlocks
from fastdeploy_dsa.byte_sizes import written_bytes
from fastdeploy_dsa.engine.scheduler import SchedulerCounts


@dataclass(frozen=True)
class EngineCacheStats:
    """Two views of the same requests. A request that is computed again is looked up and counted again.

    Attributes:
        scheduler: Tokens that had to be computed, and requests that had to give way.
        cache: Hits, blocks by state, bytes moved.
    """

    scheduler: SchedulerCounts
    cache: CacheStats

    @property
    def num_failed_copies(self) -> int:
        """Copies between device and host that failed or took too long, each counted where it was to help."""
        return self.scheduler.num_failed_loads + self.scheduler.num_failed_swap_outs + self.cache.num_failed_backups

    def table(self) -> str:
        """One line per subject, for people."""
        cache, scheduler, moved = self.cache, self.scheduler, self.cache.bytes_moved
        again = scheduler.num_preemptions - scheduler.num_swap_outs
        rows = {
            "looked up": f"{cache.num_queried_tokens} tokens, {cache.hit_rate:.1%} found: "
            f"{cache.num_device_hit_tokens} on the device, {cache.num_host_hit_tokens} on the host",
            "computed": f"{scheduler.num_computed_tokens} tokens",
            "gave way": f"{scheduler.num_preemptions} times: "
            f"{scheduler.num_swap_outs} to the host, {again} to be computed again",
            "device blocks": _written_blocks(cache.device),
            "host blocks": _written_blocks(cache.host),
            "evicted": f"{cache.num_evicted_blocks} blocks, {cache.num_lost_blocks} lost",
            "moved": f"{written_bytes(moved['device_to_host'])} to the host, "
            f"{written_bytes(moved['host_to_device'])} to the device, "
            f"{written_bytes(moved['device_to_device'])} inside the device",
            "failed copies": f"{self.num_failed_copies}",
        }
        for pool, blocks in cache.windows.items():
            rows[f"{pool} blocks"] = _written_blocks(blocks)
        if cache.windows:
            rows["snapshots"] = (
                f"{cache.num_snapshots} on the device, {cache.num_host_snapshots} on the host, "
                f"{cache.num_evicted_snapshots} evicted; {cache.num_unusable_tokens} cached tokens computed again"
            )
        width = max(map(len, rows))
        return "".join(f"{name:<{width}}  {text}\n" for name, text in rows.items())


def _written_blocks(blocks: TierBlocks) -> str:
    return f"{blocks.num_owned} owned, {blocks.num_evictable} cached, {blocks.num_free} free"
