"""Attention of query rows over selected slots of the latent cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops.reference.caches import read_latent_rows
from fastdeploy_dsa.ops.reference.number_formats import decode

Float64Array = NDArray[np.float64]


def sparse_mla(
    *,
    query: NDArray[Any],
    latent_cache: NDArray[Any],
    slot_ids: NDArray[np.int32],
    counts: NDArray[np.int32] | None,
    kv_lora_rank: int,
    softmax_scale: float,
) -> tuple[Float64Array, Float64Array]:
    """Attention over the slots of every row; rules S67 to S69.

    Args:
        query: [T, num_heads, kv_lora_rank + qk_rope_head_dim] float32 or uint16 (bfloat16).
        latent_cache: As mla_cache_write takes it.
        slot_ids: [T, topk] int32; ids outside the cache are skipped, repeated ids count repeatedly.
        counts: [T] int32, leading ids to look at; None: all of them.
        kv_lora_rank: Numbers of a row that are values.
        softmax_scale: Factor of the logits, rounded to float32 as every implementation takes it.

    Returns:
        out [T, num_heads, kv_lora_rank] and lse [T, num_heads] (natural logarithm), float64. A row without ids has
        out 0 and lse -inf.
    """
    num_tokens, num_heads, width = query.shape
    num_slots = latent_cache.shape[0] * latent_cache.shape[2]
    queries = decode(query).astype(np.float64)
    out = np.zeros((num_tokens, num_heads, kv_lora_rank))
    lse = np.full((num_tokens, num_heads), -np.inf)
    for row in range(num_tokens):
        ids = slot_ids[row] if counts is None else slot_ids[row, : max(int(counts[row]), 0)]
        ids = ids[(ids >= 0) & (ids < num_slots)]
        if not ids.size:
            continue
        rows = read_latent_rows(latent_cache, ids, kv_lora_rank, width - kv_lora_rank).astype(np.float64)
        logits = float(np.float32(softmax_scale)) * (queries[row] @ rows.T)
        largest = logits.max(-1, keepdims=True)
        weights = np.exp(logits - largest)
        total = weights.sum(-1, keepdims=True)
        out[row] = (weights / total) @ rows[:, :kv_lora_rank]
        lse[row] = (largest + np.log(total))[:, 0]
    return out, lse


def merge_attention(
    out_a: Float64Array, lse_a: Float64Array, out_b: Float64Array, lse_b: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Attention over the union of two disjoint sets of slots from the results over each; rule S70.

    Args:
        out_a: [.., kv_lora_rank] of the first set.
        lse_a: [..] of the first set, -inf where it was empty.
        out_b: Of the second set.
        lse_b: Of the second set.
    """
    lse = np.logaddexp(lse_a, lse_b)
    # exp(-inf - -inf) would be NaN; two empty sets have no weight at all.
    finite = np.where(np.isneginf(lse), 0.0, lse)
    return out_a * np.exp(lse_a - finite)[..., None] + out_b * np.exp(lse_b - finite)[..., None], lse
