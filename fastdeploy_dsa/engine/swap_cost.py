"""What a preempted request costs on its way through the host, and what it costs to compute it again."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cache_manager import CacheController

ASSUMED_BYTES_PER_SECOND = 1e9
"""Of a copy between device and host: less than any machine we know, so that a swap is never chosen by optimism."""


@dataclass
class SwapCost:
    """Decides whether a preempted request is swapped.

        2 * (blocks * bytes_per_block + window_bytes) / ASSUMED_BYTES_PER_SECOND
            <   computed tokens * seconds_per_token

    Out and in again on the left, all of them again on the right.

    The right side is pessimistic, too: seconds_per_token is the least that a step has taken so far.

    Attributes:
        bytes_per_block: Of a main block, over all cache tensors.
        window_bytes: Of what a request holds in window pools.
        seconds_per_token: Infinite before the first step.
    """

    bytes_per_block: int
    window_bytes: int = 0
    seconds_per_token: float = math.inf

    @classmethod
    def of(cls, controller: CacheController) -> SwapCost:
        """Of requests in a controller's caches."""
        windows = (pool.ring_width(1) * controller.pool_bytes_per_block(pool.name) for pool in controller.pools)
        return cls(controller.bytes_per_block, sum(windows))

    def observe(self, seconds: float, num_tokens: int) -> None:
        """A step of so many tokens took so long in the model."""
        self.seconds_per_token = min(self.seconds_per_token, seconds / num_tokens)

    def is_swap_cheaper(self, *, num_blocks: int, num_tokens: int) -> tuple[bool, str]:
        """Whether to swap a request of so many blocks and computed tokens, and why not."""
        swap = 2 * (num_blocks * self.bytes_per_block + self.window_bytes) / ASSUMED_BYTES_PER_SECOND
        compute = num_tokens * self.seconds_per_token if num_tokens else 0.0
        return (
            swap < compute,
            f"{swap:.3g} s to copy {num_blocks} blocks, {compute:.3g} s to compute {num_tokens} tokens",
        )
