from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, CpuOptions, IndexSelection, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def topk_slots(
    *,
    logits: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    request_ids: Tensor,
    topk: int,
    num_blocks: int,
    block_size: int,
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> IndexSelection:
    """Select the positions with the largest scores of each row, exactly and deterministically.

    Equal scores: the smaller position first. NaN ranks below -inf. A row with at most topk positions selects them all
    and its scores are not read.

    Args:
        logits: [T, logits_width] float32; columns from lengths[t] on are never read.
        lengths: [T] int32, at most logits_width and max_blocks * block_size.
        block_table: [B, max_blocks] int32.
        request_ids: [T] int32, each row's line of block_table.
        topk: Positions to select, at least 1.
        num_blocks: Blocks of the cache that slot ids point into; num_blocks * block_size < 2^31.
        block_size: Slots of a block.
        cpu: How to run on the CPU.

    Returns:
        The selection; a slot id is -1 where its block id lies outside the cache.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or a number is out of range.

    Source: custom_ops/include/dsa/topk_slots.h
    """
    outputs = run_op(
        "dsa_topk_slots",
        logits,
        lengths,
        block_table,
        request_ids,
        topk,
        num_blocks,
        block_size,
        *codes_of(cpu),
    )
    return IndexSelection(*outputs)
