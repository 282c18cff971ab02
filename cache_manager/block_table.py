"""Which blocks a request has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cache_manager.block_pool import BlockId
from cache_manager.errors import CacheError
from cache_manager.prefix_tree import PrefixNode
from cache_manager.transfer import LayerDoneCounter

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass
class WindowBlocks:
    """One request's blocks in a window pool: those with its last tokens.

    Attributes:
        begin: First position that it has a row of, or will have.
        first: Place of the first block it holds: block i holds positions (first + i) * block_tokens and up.
        blocks: Device blocks in order of position.
        host_blocks: Host blocks in order of position, while the request is on the host or on its way back.
    """

    begin: int = 0
    first: int = 0
    blocks: list[BlockId] = field(default_factory=list)
    host_blocks: list[BlockId] = field(default_factory=list)

    def write_ring(self, line: npt.NDArray[np.int32]) -> None:
        """Write the device blocks to a line of a block table, at place modulo width; -1 where there is none.

        Raises:
            ValueError: The line is too short.
        """
        width, count = len(line), len(self.blocks)
        if count > width:
            raise ValueError(f"line: expected {count} entries or more, got {width}")
        line[:] = -1
        begin = self.first % width
        before = min(count, width - begin)
        line[begin : begin + before] = self.blocks[:before]
        line[: count - before] = self.blocks[before:]


@dataclass(eq=False)
class BlockTable:
    """One request's blocks. `CacheManager` makes and changes it; everybody else only reads it.

    Attributes:
        salt: Of its prefixes; see prefix_tree.py.
        blocks: Device blocks in order of position; empty while the request is on the host. The list object stays.
        host_blocks: Host blocks in order of position, while the request is on the host or on its way back.
        windows: Its blocks in each window pool, by name.
        num_computed: Tokens whose cache entries exist (or will, when `load` is done).
        num_device_hits: Tokens that were found on the device when it was opened.
        num_host_hits: Tokens found on the host then.
        path: Nodes of the first blocks, as far as those are cached.
        is_closed_to_cache: No further block of it can be cached: a digest collided, or the cache was reset meanwhile.
        is_on_device: Whether it may run; False: swap_in comes first.
        load: The copy that fills some of its blocks; wait for a layer on it before the first access to that layer.
        failure: Why a load failed that the manager has undone; see CacheManager.take_failed.
    """

    salt: bytes
    blocks: list[BlockId] = field(default_factory=list)
    host_blocks: list[BlockId] = field(default_factory=list)
    windows: dict[str, WindowBlocks] = field(default_factory=dict)
    num_computed: int = 0
    num_device_hits: int = 0
    num_host_hits: int = 0
    path: list[PrefixNode] = field(default_factory=list)
    is_closed_to_cache: bool = False
    is_on_device: bool = True
    load: LayerDoneCounter | None = None
    failure: CacheError | None = None
