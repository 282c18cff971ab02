"""A double of FastDeploy's page-locked allocator."""

from __future__ import annotations

import numpy as np


class Pinned:
    """Real memory, aligned as a page; every call is counted."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.allocated: list[int] = []
        self.freed: list[int] = []
        self.refused: set[int] = set()
        self.allowed = 1 << 30
        self._memory: list[np.ndarray] = []

    def allocate(self, size: int) -> int:
        if len(self.allocated) == self.allowed:
            raise MemoryError("no more")
        memory = np.zeros(size + 4096, np.uint8)
        self._memory.append(memory)
        self.sizes.append(size)
        self.allocated.append(memory.ctypes.data + -memory.ctypes.data % 4096)
        return self.allocated[-1]

    def free(self, address: int) -> None:
        if address in self.refused:
            raise RuntimeError("not mine")
        self.freed.append(address)
