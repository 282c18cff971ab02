from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import code_of, finite_float32, require_contiguous
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import (
    DEFAULT_CPU_OPTIONS,
    ENTRY_KIND_CODES,
    SCALE_FORMAT_CODES,
    CpuOptions,
    EntryKind,
    ScaleFormat,
    codes_of,
)

if TYPE_CHECKING:
    from paddle import Tensor


def kv_compress(  # noqa: PLR0913 - an op names each of its tensors
    *,
    kv_score: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    state_cache: Tensor,
    state_table: Tensor,
    positions: Tensor,
    request_ids: Tensor,
    lengths: Tensor,
    entry_cache: Tensor,
    entry_slots: Tensor,
    eps: float,
    ratio: int,
    overlap: int,
    rope_dim: int,
    block_rows: int,
    entry_kind: EntryKind,
    scale_format: ScaleFormat = "ue8m0",
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> None:
    """Keep the compressor state of every token, then make an entry of every window that a token closes, in place.

    All states of the call are written before any window is closed, and members are added up in the order of their
    positions: an entry has the same bits however its tokens were cut into calls.

    Args:
        kv_score: [T, 2 * overlap * head_dim] float32: what goes into an entry, then its scores without ape.
        ape: [ratio, overlap * head_dim] float32, added to the scores by position modulo ratio.
        norm_weight: [head_dim] float32.
        cos: [T, rope_dim / 2] float32, of the first position of the token's window, position // ratio * ratio.
        sin: As cos.
        state_cache: [num_blocks, block_tokens, 2 * overlap * head_dim] float32, contiguous; changed.
        state_table: [B, width] int32, a ring: position p of a request is in block [p // block_tokens % width]. A token
            whose block lies outside the cache has no state; an entry with such a member becomes NaN.
        positions: [T] int32.
        request_ids: [T] int32, each row's line of state_table.
        lengths: [T] int32; rows with a length of 0 are padding and are skipped.
        entry_cache: For rows as compressed_row_write takes it, for index keys as index_key_write takes it or, fp8,
            [num_blocks, block_bytes] uint8 filled up to a multiple of 4. Contiguous; changed.
        entry_slots: [T] int64, block * block_rows + offset of the entry that the token's window makes; looked at where
            the token closes it, (position + 1) % ratio == 0. Slots outside the cache: no entry.
        eps: Of the norm, at least 0.
        ratio: Tokens of a window.
        overlap: 2 if the window before takes part, too; else 1.
        rope_dim: Numbers at the end of an entry that are rotated; even, below head_dim.
        block_rows: Entries of a block.
        entry_kind: What an entry is stored as.
        scale_format: How fp8 scales of index keys are chosen. Rows have powers of two.
        cpu: How to run on the CPU.

    Raises:
        ValueError: A tensor has another shape, dtype or device, a cache is not contiguous, a position or request id is
            out of range, or a number is; nothing was written.

    Source: custom_ops/include/dsa/kv_compress.h
    """
    require_contiguous("state_cache", state_cache)
    require_contiguous("entry_cache", entry_cache)
    run_op(
        "dsa_kv_compress",
        kv_score,
        ape,
        norm_weight,
        cos,
        sin,
        state_cache,
        state_table,
        positions,
        request_ids,
        lengths,
        entry_cache,
        entry_slots,
        finite_float32("eps", eps),
        ratio,
        overlap,
        rope_dim,
        block_rows,
        code_of("entry_kind", entry_kind, ENTRY_KIND_CODES),
        code_of("scale_format", scale_format, SCALE_FORMAT_CODES),
        *codes_of(cpu),
    )
