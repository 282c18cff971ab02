from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import require_contiguous
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, CpuOptions, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def block_copy(
    *,
    src: Tensor,
    dst: Tensor,
    src_block_ids: Tensor,
    dst_block_ids: Tensor,
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> None:
    """Copy whole blocks between two cache tensors, or inside one, in place at the destination.

    The order of copies is not defined: a block may not be written twice, nor be source and destination in one call.

    Args:
        src: [src_num_blocks, ...] any dtype, contiguous.
        dst: [dst_num_blocks, ...] dtype and block shape of src, contiguous; changed. May be src itself.
        src_block_ids: [num_copies] int64.
        dst_block_ids: [num_copies] int64.
        cpu: How to run on the CPU.

    Raises:
        ValueError: A tensor has another shape, dtype or device, an arena is not contiguous, or an id lies outside its
            arena; nothing was copied.

    Source: custom_ops/include/dsa/block_copy.h
    """
    require_contiguous("src", src)
    require_contiguous("dst", dst)
    run_op("dsa_block_copy", src, dst, src_block_ids, dst_block_ids, *codes_of(cpu))
