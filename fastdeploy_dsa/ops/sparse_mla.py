from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import finite_float32, require_bool
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, CpuOptions, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def sparse_mla(
    *,
    query: Tensor,
    latent_cache: Tensor,
    slot_ids: Tensor,
    counts: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    batch_invariant: bool = False,
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> tuple[Tensor, Tensor]:
    """Attend from query rows to their selected slots of the latent cache: prefill, decode and verify rows alike.

    Args:
        query: [T, num_heads, kv_lora_rank + qk_rope_head_dim] float32 or bfloat16, absorbed and rotated.
        latent_cache: [num_blocks, 1, block_size, row] uint8 (fp8), bfloat16 or float32.
        slot_ids: [T, topk] int32; ids outside the cache are skipped, repeated ids count repeatedly.
        counts: [T] int32, leading ids of each row to look at.
        kv_lora_rank: Leading numbers of a cache row that are also the value.
        softmax_scale: Factor on every score, finite as float32.
        batch_invariant: On a GPU, let a row's bits not depend on how many rows the call has; slower for few rows or
            for many. On the CPU they never do.
        cpu: How to run on the CPU.

    Returns:
        The output, [T, num_heads, kv_lora_rank] dtype of query; 0 for a row without ids.
        The log-sum-exp of the scores, [T, num_heads] float32, natural logarithm; -inf for a row without ids.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or a number is out of range.

    Source: custom_ops/include/dsa/sparse_mla.h
    """
    out, lse = run_op(
        "dsa_sparse_mla",
        query,
        latent_cache,
        slot_ids,
        counts,
        kv_lora_rank,
        finite_float32("softmax_scale", softmax_scale),
        require_bool("batch_invariant", batch_invariant),
        *codes_of(cpu),
    )
    return out, lse
