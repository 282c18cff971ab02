from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import given_size
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, CpuOptions, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def indexer_logits(
    *,
    query: Tensor,
    folded_weights: Tensor,
    index_cache: Tensor,
    block_table: Tensor,
    request_ids: Tensor,
    lengths: Tensor,
    logits_width: int,
    block_size: int | None = None,
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> Tensor:
    """Score every visible position of each query row against the paged index keys.

    Args:
        query: [T, index_n_heads, index_head_dim] dtype of index_cache, from index_query_quant.
        folded_weights: [T, index_n_heads] float32, from index_query_quant.
        index_cache: [num_blocks, block_size, row] uint8 (fp8), bfloat16 or float32.
        block_table: [B, max_blocks] int32.
        request_ids: [T] int32, each row's line of block_table.
        lengths: [T] int32, visible positions of each row; at most logits_width and max_blocks * block_size.
        logits_width: Columns of the result, in positions.
        block_size: Tokens of a block. Needed where the shape of index_cache does not show it: fp8 blocks that are
            filled up, [num_blocks, block_bytes] uint8.
        cpu: How to run on the CPU.

    Returns:
        [T, logits_width] float32. Columns from lengths[t] on are not written and hold anything.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or a length is too large.

    Source: custom_ops/include/dsa/indexer_logits.h
    """
    return run_op(
        "dsa_indexer_logits",
        query,
        folded_weights,
        index_cache,
        block_table,
        request_ids,
        lengths,
        logits_width,
        given_size("block_size", block_size),
        *codes_of(cpu),
    )[0]
