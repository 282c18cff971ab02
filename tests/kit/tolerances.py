"""How far float32 arithmetic may lead away from the float64 definition, derived from eps, lengths and norms."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference.caches import index_block_fields

EPS32 = 2.0**-24  # unit roundoff of float32
EPS16 = 2.0**-8  # of bfloat16
EXP_ERROR = 2.0**-21  # relative error granted to an exponential
# Errors of n roundings add up to n * eps at worst. Roundings are independent enough that the sum stays below
# CONFIDENCE * sqrt(n) * eps except with probability 2 n exp(-CONFIDENCE^2 / 2).
# Source: Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019.
CONFIDENCE = 6.0


def growth(n: int) -> float:
    """Relative error of a float32 sum of n products, relative to the sum of their magnitudes."""
    return min(float(n), CONFIDENCE * float(np.sqrt(n))) * EPS32


def indexer_logits_bound(arguments: dict[str, Any]) -> NDArray[np.float64]:
    """Bound [T, logits_width] for arguments of indexer_logits.

    error = key_scale * sum_h |w_h| * (growth(dim) * sum_d |q_hd| |k_d| + growth(heads + 2) * relu(q_h . k))
    and relu(q_h . k) <= sum_d |q_hd| |k_d|.
    """
    _, num_heads, dim = arguments["query"].shape
    # With magnitudes for numbers and weights, the op itself computes the sum above.
    magnitudes = reference.indexer_logits(
        **arguments
        | {
            "query": np.abs(reference.decode(arguments["query"])),
            "folded_weights": np.abs(arguments["folded_weights"]),
            "index_cache": _magnitudes(arguments["index_cache"]),
        }
    )
    return (growth(dim) + growth(num_heads + 2)) * magnitudes


def sparse_mla_bound(
    arguments: dict[str, Any], out: NDArray[np.float64], lse: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds of out [T, heads, kv_lora_rank] and lse [T, heads] for arguments of sparse_mla.

    z_i      dz_i = growth(width + 2) * scale * sum_d |q_d| |row_id|
    exp      e_i  = dz_i + eps * |z_i - max| + EXP_ERROR                                 relative, of p_i
    out      sum_i p_i e_i (|row_i| + |out|) + growth(n) * (sum_i p_i |row_i| + |out|) + eps_out * |out|
    lse      sum_i p_i e_i + growth(n) + 4 eps |lse|
    """
    query, cache, rank = arguments["query"], arguments["latent_cache"], arguments["kv_lora_rank"]
    width = query.shape[2]
    queries = reference.decode(query).astype(np.float64)
    scale = float(np.float32(arguments["softmax_scale"]))
    out_bound, lse_bound = np.zeros(out.shape), np.zeros(lse.shape)
    eps_out = EPS16 if query.dtype == np.uint16 else EPS32
    for t in range(len(query)):
        ids = arguments["slot_ids"][t]
        if arguments["counts"] is not None:
            ids = ids[: arguments["counts"][t]]
        ids = ids[(ids >= 0) & (ids < cache.shape[0] * cache.shape[2])]
        if not ids.size:
            continue
        rows = reference.read_latent_rows(cache, ids, rank, width - rank).astype(np.float64)
        logits = scale * (queries[t] @ rows.T)
        weights = np.exp(logits - lse[t][:, None])
        logit_error = growth(width + 2) * abs(scale) * (np.abs(queries[t]) @ np.abs(rows).T)
        relative = logit_error + EPS32 * np.abs(logits - logits.max(-1, keepdims=True)) + EXP_ERROR
        values, n = np.abs(rows[:, :rank]), len(ids)
        moved = (weights * relative).sum(-1)
        magnitude = np.abs(out[t])
        out_bound[t] = (weights * relative) @ values + moved[:, None] * magnitude
        out_bound[t] += growth(n + 2) * (weights @ values + magnitude) + eps_out * magnitude
        lse_bound[t] = moved + growth(n + 2) + 4 * EPS32 * np.abs(lse[t])
    return out_bound, lse_bound


def _magnitudes(index_cache: NDArray[Any]) -> NDArray[Any]:
    cache = index_cache.copy()
    if cache.dtype == np.float32:
        return np.abs(cache)
    numbers = index_block_fields(cache)[0] if cache.dtype == np.uint8 else cache
    numbers &= np.array(0x7F if cache.dtype == np.uint8 else 0x7FFF, cache.dtype)
    return cache
