"""Compressed attention of DeepSeek-V4: paged compressed rows, the compressor, window and entry attention with a sink.

A cache of compressed rows is uint8 [num_blocks, block_bytes] (fp8, scales at the tail of each block), or uint16
(bfloat16) or float32 [num_blocks, block_rows, head_dim].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops.reference.caches import _places, index_key_write, index_scale
from fastdeploy_dsa.ops.reference.number_formats import (
    Float32Array,
    bf16_decode,
    bf16_encode,
    bf16_round,
    decode,
    e4m3_decode,
    e4m3_encode,
    encode_as,
)
from fastdeploy_dsa.ops.types import EntryKind, ScaleFormat

Float64Array = NDArray[np.float64]

VALUE_GROUP = 64  # value numbers that share one scale
SCALE_ALIGNMENT = 8  # scale bytes of a row are filled up to a multiple of it
LARGEST_SCALE_BYTE = 254


def compressed_block_fields(
    cache: NDArray[np.uint8], block_rows: int, head_dim: int, rope_dim: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Views of an fp8 cache: data [nb, rows, value + 2 * rope_dim] and scales [nb, rows, scale bytes]; rule S32."""
    value_dim = head_dim - rope_dim
    data_bytes = value_dim + 2 * rope_dim
    scale_bytes = -(-value_dim // (VALUE_GROUP * SCALE_ALIGNMENT)) * SCALE_ALIGNMENT
    data_end = block_rows * data_bytes
    data = cache[:, :data_end].reshape(-1, block_rows, data_bytes)
    scales = cache[:, data_end : data_end + block_rows * scale_bytes].reshape(-1, block_rows, scale_bytes)
    return data, scales


def compressed_row_write(
    *, rows: NDArray[Any], cache: NDArray[Any], slot_mapping: NDArray[np.int64], rope_dim: int, block_rows: int
) -> None:
    """Pack rows into a cache of compressed rows, in place; slots outside it are skipped; rules S17, S32, S33, S35.

    Args:
        rows: [T, head_dim] float32 or uint16 (bfloat16), the last rope_dim numbers rotated.
        cache: As above.
        slot_mapping: [T] int64, block * block_rows + offset.
        rope_dim: Numbers that an fp8 cache keeps as bfloat16.
        block_rows: Rows of a block.
    """
    blocks, offsets, tokens = _places(slot_mapping, cache.shape[0], block_rows)
    numbers = decode(rows)[tokens]
    if cache.dtype != np.uint8:
        cache[blocks, offsets] = encode_as(numbers, cache.dtype)
        return
    head_dim = rows.shape[1]
    value_dim = head_dim - rope_dim
    data, scales = compressed_block_fields(cache, block_rows, head_dim, rope_dim)
    rounded = bf16_round(numbers[:, :value_dim])
    starts = range(0, value_dim, VALUE_GROUP)
    amax = np.stack([np.abs(rounded[:, at : at + VALUE_GROUP]).max(-1) for at in starts], -1)
    exponents = (index_scale(amax).view(np.uint32) >> 23) & 0xFF  # of a power of two, infinity or NaN
    stored = np.minimum(exponents, LARGEST_SCALE_BYTE).astype(np.uint8)
    spread = np.repeat(_scale_values(stored), VALUE_GROUP, axis=-1)[:, :value_dim]
    data[blocks, offsets, :value_dim] = e4m3_encode(rounded / spread)
    data[blocks, offsets, value_dim:] = bf16_encode(numbers[:, value_dim:]).view(np.uint8)
    scales[blocks, offsets] = 0  # the padding: equal rows give equal bytes
    scales[blocks, offsets, : len(starts)] = stored


def compressed_row_read(
    *, cache: NDArray[Any], slot_ids: NDArray[Any], head_dim: int, rope_dim: int, block_rows: int
) -> Float32Array:
    """Rows [n, head_dim] float32 of slots as attention sees them, exactly; zeros for slots outside the cache.

    Args:
        cache: As above.
        slot_ids: [n], block * block_rows + offset.
        head_dim: Numbers of a row.
        rope_dim: Rotated numbers among them.
        block_rows: Rows of a block.
    """
    blocks, offsets, found = _places(np.asarray(slot_ids, np.int64), cache.shape[0], block_rows)
    out = np.zeros((len(slot_ids), head_dim), np.float32)
    if cache.dtype != np.uint8:
        out[found] = decode(cache[blocks, offsets])
        return out
    value_dim = head_dim - rope_dim
    data, scales = compressed_block_fields(cache, block_rows, head_dim, rope_dim)
    spread = np.repeat(_scale_values(scales[blocks, offsets]), VALUE_GROUP, axis=-1)[:, :value_dim]
    with np.errstate(over="ignore", invalid="ignore"):
        out[found, :value_dim] = e4m3_decode(data[blocks, offsets, :value_dim]) * spread
    out[found, value_dim:] = bf16_decode(np.ascontiguousarray(data[blocks, offsets, value_dim:]).view(np.uint16))
    return out


def _scale_values(stored: NDArray[np.uint8]) -> Float32Array:
    with np.errstate(over="ignore"):  # 255, which is never written, is infinity
        values: Float32Array = np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)
    return values


def kv_compress(  # noqa: PLR0913 - an op names each of its tensors
    *,
    kv_score: Float32Array,
    ape: Float32Array,
    norm_weight: Float32Array,
    cos: Float32Array,
    sin: Float32Array,
    state_cache: Float32Array,
    state_table: NDArray[np.int32],
    positions: NDArray[np.int32],
    request_ids: NDArray[np.int32],
    lengths: NDArray[np.int32],
    entry_cache: NDArray[Any],
    entry_slots: NDArray[np.int64],
    eps: float,
    ratio: int,
    overlap: int,
    rope_dim: int,
    block_rows: int,
    entry_kind: EntryKind,
    scale_format: ScaleFormat = "ue8m0",
) -> None:
    """Write states, then the entries of the windows that close, in place; rules S14 to S18 and S31.

    Args:
        kv_score: [T, 2 * overlap * head_dim] float32.
        ape: [ratio, overlap * head_dim] float32.
        norm_weight: [head_dim] float32.
        cos: [T, rope_dim / 2] float32, of the window's first position.
        sin: As cos.
        state_cache: [num_blocks, block_tokens, 2 * overlap * head_dim] float32.
        state_table: [B, width] int32, a ring of blocks.
        positions: [T] int32.
        request_ids: [T] int32.
        lengths: [T] int32, <= 0 for padding rows.
        entry_cache: A cache of compressed rows or of index keys; fp8 index keys may be [num_blocks, block_bytes].
        entry_slots: [T] int64, looked at where (position + 1) % ratio == 0.
        eps: Of the norm, rounded to float32.
        ratio: Tokens of a window.
        overlap: 1, or 2: the window before takes part, too.
        rope_dim: Numbers that are rotated.
        block_rows: Entries of a block.
        entry_kind: A compressed row or an index key.
        scale_format: Of fp8 index keys.
    """
    width = ape.shape[1]
    live = np.flatnonzero(lengths > 0)
    for t in live:
        block, row = state_place(int(positions[t]), state_table[request_ids[t]], state_cache)
        if block >= 0:
            state_cache[block, row, :width] = kv_score[t, :width]
            state_cache[block, row, width:] = kv_score[t, width:] + ape[positions[t] % ratio]
    for t in live:
        if (positions[t] + 1) % ratio or not 0 <= entry_slots[t] < len(entry_cache) * block_rows:
            continue
        pooled = pooled_entry(int(positions[t]), state_table[request_ids[t]], state_cache, ratio, overlap)
        entry = pooled / np.sqrt((pooled**2).mean() + np.float32(eps)) * norm_weight
        entry[-rope_dim:] = rotated(entry[-rope_dim:], cos[t], sin[t])
        numbers, slot = entry.astype(np.float32)[None], entry_slots[t : t + 1]
        if entry_kind == "row":
            compressed_row_write(
                rows=numbers, cache=entry_cache, slot_mapping=slot, rope_dim=rope_dim, block_rows=block_rows
            )
        else:
            keys = index_key_blocks(entry_cache, block_rows, len(entry))
            index_key_write(key=numbers, cache=keys, slot_mapping=slot, scale_format=scale_format)


def state_place(position: int, ring: NDArray[np.int32], state_cache: NDArray[Any]) -> tuple[int, int]:
    """Block (-1: none) and row of the state of a position; rule S31 with the table as a ring."""
    num_blocks, block_tokens, _ = state_cache.shape
    block = int(ring[position // block_tokens % len(ring)])
    return (block if 0 <= block < num_blocks else -1), position % block_tokens


def pooled_entry(
    position: int, ring: NDArray[np.int32], state_cache: Float32Array, ratio: int, overlap: int
) -> Float64Array:
    """The weighted mean [head_dim] of the window that ends at position, before its norm; NaN without a state."""
    width = state_cache.shape[2] // 2
    head_dim = width // overlap
    members = []
    for member in range(max(position - overlap * ratio + 1, 0), position + 1):
        block, row = state_place(member, ring, state_cache)
        if block < 0:
            return np.full(head_dim, np.nan)
        first = head_dim if overlap == 2 and member > position - ratio else 0
        state = state_cache[block, row].astype(np.float64)
        members.append([state[first : first + head_dim], state[width + first : width + first + head_dim]])
    values, scores = np.stack(members, 1)
    weights = np.exp(scores - scores.max(0))
    mean: Float64Array = (weights * values).sum(0) / weights.sum(0)
    return mean


def rotated(x: Float64Array, cos: Float32Array, sin: Float32Array) -> Float64Array:
    """Pairs (2i, 2i + 1) of the last axis turned by the angles of cos and sin, in float64."""
    even, odd = x[..., ::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1, dtype=np.float64).reshape(x.shape)


def index_key_blocks(cache: NDArray[Any], block_rows: int, head_dim: int) -> NDArray[Any]:
    """An index-key cache as [num_blocks, block_rows, row]: a view without what fills up fp8 blocks of bytes."""
    if cache.ndim == 3:
        return cache
    row_bytes = head_dim + np.dtype(np.float32).itemsize
    return cache[:, : block_rows * row_bytes].reshape(-1, block_rows, row_bytes)


def compressed_mla(
    *,
    query: NDArray[Any],
    window_cache: NDArray[Any],
    window_slots: NDArray[np.int32],
    window_counts: NDArray[np.int32] | None,
    window_block_rows: int,
    entry_cache: NDArray[Any] | None,
    entry_slots: NDArray[np.int32] | None,
    entry_counts: NDArray[np.int32] | None,
    entry_block_rows: int,
    sinks: Float32Array,
    rope_dim: int,
    softmax_scale: float,
) -> tuple[Float64Array, Float64Array]:
    """Attention over window rows, then entries, with a sink; rules S25 and S26.

    Args:
        query: [T, num_heads, head_dim] float32 or uint16 (bfloat16).
        window_cache: A cache of compressed rows.
        window_slots: [T, window_width] int32; ids outside the cache are skipped, repeated ids count repeatedly.
        window_counts: [T] int32, leading slots to look at; None: all of them.
        window_block_rows: Rows of a block.
        entry_cache: Another one; None for the three: no entries.
        entry_slots: [T, entry_width] int32.
        entry_counts: [T] int32.
        entry_block_rows: Rows of a block of entry_cache.
        sinks: [num_heads] float32.
        rope_dim: Rotated numbers of a row.
        softmax_scale: Factor of the logits, rounded to float32.

    Returns:
        out [T, num_heads, head_dim] and lse [T, num_heads] (natural logarithm, without the sink), float64. A row
        without ids has out 0 and lse -inf.
    """
    num_tokens, num_heads, head_dim = query.shape
    queries = decode(query).astype(np.float64)
    out = np.zeros(query.shape)
    lse = np.full((num_tokens, num_heads), -np.inf)
    for t in range(num_tokens):
        parts = [visible_rows(window_cache, window_slots, window_counts, window_block_rows, t, head_dim, rope_dim)]
        if entry_cache is not None and entry_slots is not None:
            parts.append(visible_rows(entry_cache, entry_slots, entry_counts, entry_block_rows, t, head_dim, rope_dim))
        rows = np.concatenate(parts).astype(np.float64)
        if not len(rows):
            continue
        logits = float(np.float32(softmax_scale)) * (queries[t] @ rows.T)
        largest = logits.max(-1, keepdims=True)
        weights = np.exp(logits - largest)
        lse[t] = (largest + np.log(weights.sum(-1, keepdims=True)))[:, 0]
        with np.errstate(over="ignore"):
            sink = np.exp(sinks.astype(np.float64)[:, None] - largest)
        out[t] = (weights / (weights.sum(-1, keepdims=True) + sink)) @ rows
    return out, lse


def visible_rows(
    cache: NDArray[Any],
    slots: NDArray[np.int32],
    counts: NDArray[np.int32] | None,
    block_rows: int,
    token: int,
    head_dim: int,
    rope_dim: int,
) -> Float32Array:
    """The rows [n, head_dim] float32 of a token's valid slots, in their order."""
    ids = slots[token] if counts is None else slots[token, : max(int(counts[token]), 0)]
    ids = ids[(ids >= 0) & (ids < len(cache) * block_rows)]
    return compressed_row_read(cache=cache, slot_ids=ids, head_dim=head_dim, rope_dim=rope_dim, block_rows=block_rows)


def inverse_rope(*, x: NDArray[Any], cos: Float32Array, sin: Float32Array) -> None:
    """Turn the last numbers of every head back, in place; rule S28.

    Args:
        x: [T, num_heads, head_dim] float32 or uint16 (bfloat16).
        cos: [T, rope_dim / 2] float32.
        sin: As cos.
    """
    rope_dim = 2 * cos.shape[1]
    numbers = decode(x[..., -rope_dim:]).astype(np.float64)
    turned = rotated(numbers, cos[:, None], -sin[:, None])
    x[..., -rope_dim:] = encode_as(turned.astype(np.float32), x.dtype)
