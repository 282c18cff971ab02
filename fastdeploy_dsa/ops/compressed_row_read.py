from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, CpuOptions, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def compressed_row_read(
    *,
    cache: Tensor,
    slot_ids: Tensor,
    head_dim: int,
    rope_dim: int,
    block_rows: int,
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> Tensor:
    """Read rows of a paged cache of compressed rows.

    Args:
        cache: As compressed_row_write takes it.
        slot_ids: [N] int64, block * block_rows + offset; slots outside the cache give zeros.
        head_dim: Numbers of a row.
        rope_dim: Rotated numbers among them, at the end; even, below head_dim.
        block_rows: Rows of a block.
        cpu: How to run on the CPU.

    Returns:
        [N, head_dim] float32, the exact values of what is stored.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or a number is out of range.

    Source: custom_ops/include/dsa/compressed_row_read.h
    """
    return run_op("dsa_compressed_row_read", cache, slot_ids, head_dim, rope_dim, block_rows, *codes_of(cpu))[0]
