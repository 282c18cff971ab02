"""Byte layouts of compressed attention: entries that stand for several tokens, window rows and compressor states.

Each role has its own block. Blocks of entries cover the cache's block size; window rows and states are kept for the
last tokens of a request only, in pools of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cache_manager import MAIN_POOL, CachePool, CacheTensorSpec
from fastdeploy_dsa.cache_layout import ITEM_BYTES, ByteField, CacheSpan, TokenLayout, index_layout
from fastdeploy_dsa.ops import CacheFormat

ENTRY_BLOCK_TOKENS = 256  # unless the user asks for another block size
WINDOW_BLOCK_TOKENS = 64
STATE_BLOCK_TOKENS = {4: 4, 128: 8}  # tokens of a state block by compression ratio
OVERLAP = {4: 2, 128: 1}  # windows that an entry is made from: its own, and for ratio 4 the one before

WINDOW_POOL = "swa"
STATE_POOL = {4: "state4", 128: "state128"}  # by compression ratio

FP8_BLOCK_ALIGNMENT = 576  # blocks of fp8 rows are filled up to whole rows of data: kernels step in such rows
VALUE_GROUP = 64  # value numbers of a row that share one scale
SCALE_ALIGNMENT = 8  # scale bytes of a row


@dataclass(frozen=True)
class CompressedSizes:
    """What the layouts depend on.

    Attributes:
        ratios: Layer id to compression ratio, 1 for layers that see the window only; draft layers included.
        selecting_layers: The ratio-4 layers that run their indexer.
    """

    head_dim: int
    qk_rope_head_dim: int
    index_head_dim: int
    sliding_window: int
    ratios: tuple[tuple[int, int], ...]
    selecting_layers: tuple[int, ...]


def row_layout(cache_format: CacheFormat, head_dim: int, qk_rope_head_dim: int) -> TokenLayout:
    """One window row or entry: 584, 1024 or 2048 bytes for 448 + 64 numbers.

    Source: FlashMLA's fp8 rows of DeepSeek-V4, scales at the tail of each block; rules S32, S35.
    """
    if cache_format != "fp8":
        return TokenLayout(cache_format, (ByteField("row", cache_format, head_dim),), "per_token")
    value = head_dim - qk_rope_head_dim
    scales = -(-math.ceil(value / VALUE_GROUP) // SCALE_ALIGNMENT) * SCALE_ALIGNMENT
    fields = (
        ByteField("value", "e4m3", value),
        ByteField("rope", "bfloat16", qk_rope_head_dim),
        ByteField("scale", "uint8", scales),
    )
    row_bytes = sum(field.num_bytes for field in fields)
    return TokenLayout(f"fp8_{row_bytes}", fields, "tail_scales")


def require_block_size(sizes: CompressedSizes, block_size: int) -> None:
    """Check that every block of entries holds whole windows, and ends where a block of window rows does.

    Raises:
        ValueError: It does not.
    """
    unit = math.lcm(WINDOW_BLOCK_TOKENS, *(ratio for _, ratio in sizes.ratios))
    if block_size < 1 or block_size % unit:
        raise ValueError(
            f"block_size: expected a multiple of {unit}, which covers compression windows and blocks of window rows, "
            f"got {block_size}"
        )


def compressed_pools(sizes: CompressedSizes) -> tuple[CachePool, ...]:
    """The pools of window rows and compressor states.

    A prefix that ends at a boundary of blocks needs the rows of the window before it, and of ratio 4, whose entries
    overlap, the states of the last window; ratio 128 begins anew.

    Source: rules S31, S58, S61.
    """
    used = {ratio for _, ratio in sizes.ratios}
    window = CachePool(WINDOW_POOL, WINDOW_BLOCK_TOKENS, sizes.sliding_window, sizes.sliding_window - 1)
    states = (
        CachePool(STATE_POOL[ratio], STATE_BLOCK_TOKENS[ratio], OVERLAP[ratio] * ratio, (OVERLAP[ratio] - 1) * ratio)
        for ratio in sorted(STATE_POOL)
        if ratio in used
    )
    return (window, *states)


def compressed_spans(
    sizes: CompressedSizes,
    *,
    cache_format: CacheFormat,
    layer_ids: tuple[int, ...],
    block_size: int = ENTRY_BLOCK_TOKENS,
) -> tuple[CacheSpan, ...]:
    """The cache tensors of these layers, in the order they have inside a layer.

    Roles: `key` (entries; other blocks for ratio 4 than for ratio 128), `indexer` (ratio-4 layers that select), `swa`
    (window rows, every layer), `comp_state` and `idx_comp_state` (rows from which the next entry is made).

    Source: rules S30-S36, S53 (a layer that shares another's selection has no index entries and no index state).

    Raises:
        ValueError: As require_block_size.
    """
    require_block_size(sizes, block_size)
    row = row_layout(cache_format, sizes.head_dim, sizes.qk_rope_head_dim)
    key_bytes = index_layout(cache_format, sizes.index_head_dim) if sizes.selecting_layers else None
    of_ratio = {
        ratio: tuple(layer for layer, own in sizes.ratios if own == ratio and layer in layer_ids) for ratio in (4, 128)
    }
    selecting = tuple(layer for layer in of_ratio[4] if layer in sizes.selecting_layers)
    all_layers = tuple(layer for layer, _ in sizes.ratios if layer in layer_ids)
    pools = {pool.name: pool for pool in compressed_pools(sizes)}
    spans = [_entry_span("key", "key_caches", row, ratio, of_ratio[ratio], block_size) for ratio in (4, 128)]
    if key_bytes is not None:
        spans.append(_entry_span("indexer", "indexer_caches", key_bytes, 4, selecting, block_size))
    spans.append(_row_span("swa", "swa_caches", row, all_layers, pools[WINDOW_POOL]))
    for role, width, ratio, layers in (
        ("comp_state", sizes.head_dim, 4, of_ratio[4]),
        ("comp_state", sizes.head_dim, 128, of_ratio[128]),
        ("idx_comp_state", sizes.index_head_dim, 4, selecting),
    ):
        if layers:
            layout = _state_layout(width, ratio)
            spans.append(_row_span(role, f"{role}_caches", layout, layers, pools[STATE_POOL[ratio]]))
    return tuple(span for span in spans if span.spec.layer_ids)


def _entry_span(
    role: str, storage_name: str, layout: TokenLayout, ratio: int, layers: tuple[int, ...], block_size: int
) -> CacheSpan:
    entries = block_size // ratio
    spec = _rows_spec(role, storage_name, layout, entries, layers, MAIN_POOL)
    return CacheSpan(spec, block_size, entries * layout.token_bytes)


def _row_span(
    role: str, storage_name: str, layout: TokenLayout, layers: tuple[int, ...], pool: CachePool
) -> CacheSpan:
    spec = _rows_spec(role, storage_name, layout, pool.block_tokens, layers, pool.name)
    return CacheSpan(spec, pool.block_tokens, pool.block_tokens * layout.token_bytes, pool.live_tokens)


def _state_layout(width: int, ratio: int) -> TokenLayout:
    """Rows of float32: what goes into an entry, then its scores."""
    numbers = OVERLAP[ratio] * width
    fields = (ByteField("value", "float32", numbers), ByteField("score", "float32", numbers))
    return TokenLayout("float32", fields, "per_token")


def _rows_spec(
    role: str, storage_name: str, layout: TokenLayout, rows: int, layers: tuple[int, ...], pool: str
) -> CacheTensorSpec:
    """fp8 blocks are bytes, [num_blocks, bytes and padding]; others [num_blocks, rows, numbers]."""
    if layout.arrangement == "per_token" or not layout.name.startswith("fp8"):
        dtype = layout.fields[0].dtype
        shape: tuple[int, ...] = (rows, sum(field.count for field in layout.fields))
        layout_id = f"{role}/{layout.name}/n{rows}"
    else:
        dtype, shape = "uint8", (-(-rows * layout.token_bytes // FP8_BLOCK_ALIGNMENT) * FP8_BLOCK_ALIGNMENT,)
        layout_id = f"{role}/{layout.name}/n{rows}/tail-scales"
    return CacheTensorSpec(
        role=role,
        storage_name=storage_name,
        layer_ids=layers,
        block_shape=shape,
        dtype=dtype,
        item_bytes=ITEM_BYTES[dtype],
        layout_id=layout_id,
        pool=pool,
    )
