"""Index queries, scores and the selection of the top-k slots."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops.reference.caches import index_scale, read_index_keys
from fastdeploy_dsa.ops.reference.number_formats import (
    Float32Array,
    bf16_encode,
    bf16_round,
    decode,
    e4m3_encode,
)
from fastdeploy_dsa.ops.types import CacheFormat

Int32Array = NDArray[np.int32]


class IndexSelection(NamedTuple):
    """Selected keys of every row, in ascending order and followed by -1."""

    positions: Int32Array  # [T, topk] request-local
    slot_ids: Int32Array  # [T, topk] same order; also -1 where the block lies outside the cache
    counts: Int32Array  # [T]


def index_query_quant(
    *, query: NDArray[Any], weights: Float32Array, cache_format: CacheFormat
) -> tuple[NDArray[Any], Float32Array]:
    """Bring queries into the format of the cache and fold all factors into the head weights; rules S26 and S29.

    Args:
        query: [T, index_n_heads, index_head_dim] float32 or uint16 (bfloat16).
        weights: [T, index_n_heads] float32.
        cache_format: Of the index cache that the queries will be scored against.

    Returns:
        The query in uint8 (e4m3), uint16 or float32, and [T, index_n_heads] float32 folded weights.
    """
    _, num_heads, dim = query.shape
    factor = np.float32((dim * num_heads) ** -0.5)
    values = decode(query)
    if cache_format == "float32":
        return values, weights * factor
    if cache_format == "bfloat16":
        return bf16_encode(values), weights * factor
    rounded = bf16_round(values)
    scale = index_scale(np.abs(rounded).max(-1))
    return e4m3_encode(rounded / scale[..., None]), (weights * scale) * factor


def indexer_logits(
    *,
    query: NDArray[Any],
    folded_weights: Float32Array,
    index_cache: NDArray[Any],
    block_table: Int32Array,
    request_ids: Int32Array,
    lengths: Int32Array,
    logits_width: int,
) -> NDArray[np.float64]:
    """Score every visible key; rule S30.

    Args:
        query: [T, index_n_heads, index_head_dim] uint8 (e4m3), uint16 (bfloat16) or float32.
        folded_weights: [T, index_n_heads] float32.
        index_cache: As index_key_write takes it, in the format of the query.
        block_table: [B, max_blocks] int32.
        request_ids: [T] int32, line of block_table; read only where lengths > 0.
        lengths: [T] int32, visible keys; values <= 0 mean none.
        logits_width: Columns of the result.

    Returns:
        [T, logits_width] float64; NaN from lengths[t] on and where a block id lies outside the cache.
    """
    logits = np.full((len(lengths), logits_width), np.nan)
    queries = decode(query).astype(np.float64)
    for request in np.unique(request_ids[lengths > 0]):
        rows = np.flatnonzero((request_ids == request) & (lengths > 0))
        slots = position_slots(np.arange(lengths[rows].max()), block_table[request], index_cache)
        keys = np.full((len(slots), query.shape[2]), np.nan)
        scales = np.full(len(slots), np.nan)
        keys[slots >= 0], scales[slots >= 0] = read_index_keys(index_cache, slots[slots >= 0])
        for row in rows:
            length = lengths[row]
            dots = np.maximum(queries[row] @ keys[:length].T, 0)
            logits[row, :length] = scales[:length] * (folded_weights[row].astype(np.float64) @ dots)
    return logits


def position_slots(positions: NDArray[Any], blocks: Int32Array, cache: NDArray[Any]) -> NDArray[np.int64]:
    """Slots of request-local positions, -1 where the block lies outside the cache; rule S64.

    Args:
        positions: [n], none negative, all within the line of the table.
        blocks: [max_blocks] int32, the request's line.
        cache: An index cache [num_blocks, block_size, ..].
    """
    return _slots(positions, blocks, num_blocks=cache.shape[0], block_size=cache.shape[1])


def topk_slots(
    *,
    logits: Float32Array,
    lengths: Int32Array,
    block_table: Int32Array,
    request_ids: Int32Array,
    topk: int,
    num_blocks: int,
    block_size: int,
) -> IndexSelection:
    """Select the topk largest scores of every row exactly, ties to the smaller position; rules S34 to S37.

    Args:
        logits: [T, logits_width] float32; columns from lengths[t] on are not read.
        lengths: [T] int32; values <= 0 select nothing.
        block_table: [B, max_blocks] int32.
        request_ids: [T] int32, line of block_table; read only where lengths > 0.
        topk: Width of the selection, >= 1.
        num_blocks: Blocks of the cache.
        block_size: Tokens of a block.
    """
    num_tokens = len(lengths)
    positions = np.full((num_tokens, topk), -1, np.int32)
    slot_ids = np.full((num_tokens, topk), -1, np.int32)
    counts = np.minimum(np.maximum(lengths, 0), topk).astype(np.int32)
    for row in np.flatnonzero(counts):
        selected = topk_positions(logits[row, : lengths[row]], topk)
        positions[row, : counts[row]] = selected
        line = block_table[request_ids[row]]
        slot_ids[row, : counts[row]] = _slots(selected, line, num_blocks=num_blocks, block_size=block_size)
    return IndexSelection(positions, slot_ids, counts)


def topk_positions(scores: Float32Array, topk: int) -> NDArray[np.int64]:
    """Positions of the topk best scores, ascending: -0 equals +0, NaN below -inf, ties to the smaller position."""
    if len(scores) <= topk:
        return np.arange(len(scores))
    is_nan = np.isnan(scores)
    comparable = np.where(is_nan, -np.inf, scores + np.float32(0))
    order = np.lexsort((np.arange(len(scores)), is_nan, -comparable))
    return np.sort(order[:topk])


def index_select(
    *,
    query: NDArray[Any],
    folded_weights: Float32Array,
    index_cache: NDArray[Any],
    block_table: Int32Array,
    request_ids: Int32Array,
    lengths: Int32Array,
    max_length: int,
    topk: int,
    max_logits_bytes: int = 512 << 20,
) -> IndexSelection:
    """Select with the scores of indexer_logits rounded to float32; max_logits_bytes never changes the result.

    Args:
        query: As indexer_logits takes it, like the next five.
        folded_weights: [T, index_n_heads] float32.
        index_cache: In the format of the query.
        block_table: [B, max_blocks] int32.
        request_ids: [T] int32.
        lengths: [T] int32.
        max_length: The largest of lengths, or more.
        topk: Width of the selection.
        max_logits_bytes: Ignored here.
    """
    del max_logits_bytes
    logits = indexer_logits(
        query=query,
        folded_weights=folded_weights,
        index_cache=index_cache,
        block_table=block_table,
        request_ids=request_ids,
        lengths=lengths,
        logits_width=max_length,
    )
    return topk_slots(
        logits=logits.astype(np.float32),
        lengths=lengths,
        block_table=block_table,
        request_ids=request_ids,
        topk=topk,
        num_blocks=index_cache.shape[0],
        block_size=index_cache.shape[1],
    )


def _slots(positions: NDArray[Any], blocks: Int32Array, *, num_blocks: int, block_size: int) -> NDArray[np.int64]:
    ids = blocks[positions // block_size].astype(np.int64)
    return np.where((ids >= 0) & (ids < num_blocks), ids * block_size + positions % block_size, -1)
