from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import finite_float32, require_bool
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, CpuOptions, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def compressed_mla(  # noqa: PLR0913 - an op names each of its tensors
    *,
    query: Tensor,
    window_cache: Tensor,
    window_slots: Tensor,
    window_counts: Tensor,
    window_block_rows: int,
    entry_cache: Tensor | None,
    entry_slots: Tensor | None,
    entry_counts: Tensor | None,
    entry_block_rows: int,
    sinks: Tensor,
    rope_dim: int,
    softmax_scale: float,
    batch_invariant: bool = False,
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> tuple[Tensor, Tensor]:
    """Attend from query rows to window rows and compressed entries, with a sink: prefill, decode and verify rows.

    Args:
        query: [T, num_heads, head_dim] float32 or bfloat16, the last rope_dim numbers rotated.
        window_cache: As compressed_row_write takes it.
        window_slots: [T, window_width] int32; ids outside the cache are skipped, repeated ids count repeatedly.
        window_counts: [T] int32, leading slots of each row to look at.
        window_block_rows: Rows of a block of window_cache.
        entry_cache: As window_cache, in the same format. A layer without entries gives None for the three.
        entry_slots: [T, entry_width] int32, as window_slots.
        entry_counts: [T] int32, as window_counts.
        entry_block_rows: Rows of a block of entry_cache; not looked at without one.
        sinks: [num_heads] float32, a logit in the denominator alone; -inf is none.
        rope_dim: Numbers at the end of a row that an fp8 cache keeps as bfloat16; even, below head_dim.
        softmax_scale: Factor on every score but the sink, finite as float32.
        batch_invariant: On a GPU, let a row's bits not depend on how many rows the call has; slower for few rows or
            for many. On the CPU they never do.
        cpu: How to run on the CPU.

    Returns:
        The output, [T, num_heads, head_dim] dtype of query; 0 for a row without ids.
        The log-sum-exp of the scores without the sink, [T, num_heads] float32, natural logarithm; -inf for a row
        without ids.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or a number is out of range.

    Source: custom_ops/include/dsa/compressed_mla.h
    """
    entries = {"entry_cache": entry_cache, "entry_slots": entry_slots, "entry_counts": entry_counts}
    missing = [name for name, tensor in entries.items() if tensor is None]
    if 0 < len(missing) < len(entries):
        raise ValueError(f"{missing[0]}: expected a paddle.Tensor, or None for all of {', '.join(entries)}, got None")
    out, lse = run_op(
        "dsa_compressed_mla",
        query,
        window_cache,
        window_slots,
        window_counts,
        entry_cache,
        entry_slots,
        entry_counts,
        sinks,
        window_block_rows,
        entry_block_rows,
        rope_dim,
        finite_float32("softmax_scale", softmax_scale),
        require_bool("batch_invariant", batch_invariant),
        *codes_of(cpu),
    )
    return out, lse
