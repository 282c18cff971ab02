from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import require_contiguous
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, CpuOptions, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def compressed_row_write(
    *,
    rows: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    rope_dim: int,
    block_rows: int,
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> None:
    """Write rows into a paged cache of compressed rows (window rows and entries of DeepSeek-V4), in place.

    Args:
        rows: [T, head_dim] float32 or bfloat16, normalised, the last rope_dim numbers rotated.
        cache: fp8: [num_blocks, block_bytes] uint8, scales at the tail of each block, filled up at will; else
            [num_blocks, block_rows, head_dim] bfloat16 or float32. Contiguous; changed.
        slot_mapping: [T] int64, block * block_rows + offset; slots outside the cache are not written.
        rope_dim: Numbers at the end of a row that an fp8 cache keeps as bfloat16; even, below head_dim.
        block_rows: Rows of a block.
        cpu: How to run on the CPU.

    Raises:
        ValueError: A tensor has another shape, dtype or device, cache is not contiguous, or a number is out of range.

    Source: custom_ops/include/dsa/compressed_row_write.h
    """
    require_contiguous("cache", cache)
    run_op("dsa_compressed_row_write", rows, cache, slot_mapping, rope_dim, block_rows, *codes_of(cpu))
