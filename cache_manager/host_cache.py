"""Host memory for the blocks that leave the device: one arena per tensor role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cache_manager.errors import HostAllocationFailed
from cache_manager.spec import MAIN_POOL, CacheTensorSpec, TensorKey

ALIGNMENT = 4096  # a page: neither page-locking nor a copy engine meets a partial one
HostArray = npt.NDArray[np.uint8]


class HostAllocator(Protocol):
    """Where host memory comes from: page-locked memory if the device offers it, plain memory otherwise."""

    def allocate(self, num_bytes: int) -> HostArray:
        """[num_bytes] uint8, aligned to ALIGNMENT, content arbitrary. Raises whatever describes a failure."""

    def free(self, memory: HostArray) -> None:
        """Release what allocate returned; the array is not used afterwards."""


class PlainAllocator:
    """Aligned pageable memory."""

    def allocate(self, num_bytes: int) -> HostArray:
        """As HostAllocator.allocate."""
        memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
        begin = -memory.ctypes.data % ALIGNMENT
        return memory[begin : begin + num_bytes]

    def free(self, memory: HostArray) -> None:
        """NumPy frees the memory with its last view."""


class HostCache:
    """The host tier's memory. All layers that have a role share one allocation; a layer's part is an array.

    Attributes:
        num_blocks: Blocks by pool, of every layer and role in it; the same id means the same tokens in all of them.
        arrays: (role, layer) to [num_blocks, bytes_per_block] uint8.
    """

    def __init__(
        self, specs: Iterable[CacheTensorSpec], num_blocks: Mapping[str, int], allocator: HostAllocator
    ) -> None:
        """Allocate one arena per role.

        Args:
            specs: Of all groups; the same role may occur in several, with blocks of another size.
            num_blocks: Blocks per layer, by pool.
            allocator: Frees what it allocated, too.

        Raises:
            ValueError: A number of blocks is below 1, or a pool has none.
            HostAllocationFailed: The allocator cannot free, or an allocation failed; nothing stays allocated.
        """
        specs = [spec for spec in specs if spec.layer_ids]
        for pool in sorted({MAIN_POOL, *num_blocks, *(spec.pool for spec in specs)}):
            if num_blocks.get(pool, 0) < 1:
                name = "num_host_blocks" if pool == MAIN_POOL else f"host_window_blocks of pool {pool}"
                raise ValueError(f"{name}: expected 1 or more, got {num_blocks.get(pool, 0)}")
        if not callable(getattr(allocator, "free", None)):
            raise HostAllocationFailed("the allocator cannot free, so nothing is allocated")
        self.num_blocks = num_blocks
        self._allocator = allocator
        self._arenas: dict[str, HostArray] = {}
        self._arrays: dict[TensorKey, HostArray] = {}
        by_role: dict[str, list[CacheTensorSpec]] = {}
        for spec in specs:
            by_role.setdefault(spec.role, []).append(spec)
        try:
            for role, role_specs in by_role.items():
                self._add_arena(role, role_specs)
        except Exception as cause:
            self.free()
            raise HostAllocationFailed(
                f"the host tier of {num_blocks[MAIN_POOL]} blocks could not be allocated: {cause}"
            ) from cause

    @property
    def arrays(self) -> Mapping[TensorKey, HostArray]:
        return MappingProxyType(self._arrays)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arenas."""
        return sum(arena.nbytes for arena in self._arenas.values())

    def free(self) -> None:
        """Release every arena, even if releasing one fails; a second call does nothing.

        Raises:
            HostAllocationFailed: Releasing failed for some; the rest is released.
        """
        failures = []
        self._arrays.clear()
        while self._arenas:
            role, arena = self._arenas.popitem()
            try:
                self._allocator.free(arena)
            except Exception as failure:  # noqa: BLE001 - whatever it is, the other arenas must go as well
                failures.append(f"{role}: {failure}")
        if failures:
            raise HostAllocationFailed(f"not all host memory was released: {'; '.join(failures)}")

    def _add_arena(self, role: str, specs: list[CacheTensorSpec]) -> None:
        places, end = dict[int, tuple[int, int, int]](), 0
        for spec in specs:
            count, width = self.num_blocks[spec.pool], spec.bytes_per_block
            for layer in spec.layer_ids:
                places[layer] = (end, count, width)
                end += -(-count * width // ALIGNMENT) * ALIGNMENT
        arena = self._allocator.allocate(end)
        self._arenas[role] = arena
        if arena.dtype != np.uint8 or arena.shape != (end,):
            raise ValueError(f"allocator: expected [{end}] uint8, got {arena.shape} {arena.dtype}")
        for layer, (begin, count, width) in places.items():
            self._arrays[role, layer] = arena[begin : begin + count * width].reshape(count, width)
