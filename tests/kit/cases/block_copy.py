"""Cases of block_copy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.kit.cases.common import SPARE_BLOCKS, Arguments
from tests.kit.poison import invalid_ids, poisoned_blocks


@dataclass(frozen=True)
class BlockCopyCase:
    """Blocks that move between two arenas whose blocks lie differently far apart."""

    num_copies: int = 5
    block_shape: tuple[int, ...] = (64, 132)
    dtype: str = "uint8"
    src_gap_bytes: int = 0
    dst_gap_bytes: int = 0
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of block_copy."""
        rng = np.random.default_rng(self.seed)
        src_blocks, dst_blocks = self.num_copies + SPARE_BLOCKS, self.num_copies + 2 * SPARE_BLOCKS
        src = poisoned_blocks(src_blocks, self.block_shape, self.dtype, gap_bytes=self.src_gap_bytes)
        dst = poisoned_blocks(dst_blocks, self.block_shape, self.dtype, gap_bytes=self.dst_gap_bytes)
        numbers = rng.integers(0, 256, (src_blocks, src[0].nbytes), dtype=np.uint8)
        src[...] = numbers.view(self.dtype).reshape(src.shape)
        return {
            "src": src,
            "dst": dst,
            "src_block_ids": rng.permutation(src_blocks)[: self.num_copies].astype(np.int64),
            "dst_block_ids": rng.permutation(dst_blocks)[: self.num_copies].astype(np.int64),
        }


def rejected_block_ids(num_blocks: int) -> list[int]:
    """Block ids that block_copy refuses."""
    return invalid_ids(num_blocks, np.int64)
