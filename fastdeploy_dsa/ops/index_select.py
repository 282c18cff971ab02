from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import given_size
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, CpuOptions, IndexSelection, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def index_select(
    *,
    query: Tensor,
    folded_weights: Tensor,
    index_cache: Tensor,
    block_table: Tensor,
    request_ids: Tensor,
    lengths: Tensor,
    max_length: int,
    topk: int,
    max_logits_bytes: int = 512 << 20,
    block_size: int | None = None,
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> IndexSelection:
    """Score and select in one call: bit for bit indexer_logits and topk_slots, with bounded memory for the scores.

    Args:
        query: [T, index_n_heads, index_head_dim] dtype of index_cache, from index_query_quant.
        folded_weights: [T, index_n_heads] float32, from index_query_quant.
        index_cache: [num_blocks, block_size, row] uint8 (fp8), bfloat16 or float32.
        block_table: [B, max_blocks] int32.
        request_ids: [T] int32, each row's line of block_table.
        lengths: [T] int32, visible positions of each row; at most max_length and max_blocks * block_size.
        max_length: The largest of lengths, or more; sizes the score rows without reading lengths on the host.
        topk: Positions to select, at least 1.
        max_logits_bytes: Budget for scores that exist at a time; one row always fits.
        block_size: Tokens of a block. Needed where the shape of index_cache does not show it: fp8 blocks that are
            filled up, [num_blocks, block_bytes] uint8.
        cpu: How to run on the CPU.

    Returns:
        The selection; a slot id is -1 where its block id lies outside the cache.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or a number is out of range.

    Source: custom_ops/include/dsa/index_select.h
    """
    outputs = run_op(
        "dsa_index_select",
        query,
        folded_weights,
        index_cache,
        block_table,
        request_ids,
        lengths,
        max_length,
        topk,
        max_logits_bytes,
        given_size("block_size", block_size),
        *codes_of(cpu),
    )
    return IndexSelection(*outputs)
