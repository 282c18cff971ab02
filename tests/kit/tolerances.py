"""How far float32 arithmetic may lead away from the float64 definition, derived from eps, lengths and norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference.caches import LATENT_GROUP, LatentFields, index_block_fields
from fastdeploy_dsa.ops.reference.indexer import position_slots

EPS32 = 2.0**-24  # unit roundoff of float32
EPS16 = 2.0**-8  # of bfloat16
TENSOR_CORE_EPS = 2.0**-13  # of the largest addend, which the tensor cores of Hopper cut off every e4m3 product
TENSOR_CORE_STEP = 32  # products that are added at a time
EXP_ERROR = 2.0**-21  # relative error granted to an exponential
# Errors of n roundings add up to n * eps at worst. Roundings are independent enough that the sum stays below
# CONFIDENCE * sqrt(n) * eps except with probability 2 n exp(-CONFIDENCE^2 / 2).
# Source: Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019.
CONFIDENCE = 6.0


def growth(n: int) -> float:
    """Relative error of a float32 sum of n products, relative to the sum of their magnitudes."""
    return min(float(n), CONFIDENCE * float(np.sqrt(n))) * EPS32


def indexer_logits_bound(arguments: dict[str, Any], *, truncates_sums: bool = False) -> NDArray[np.float64]:
    """Bound [T, logits_width] for arguments of indexer_logits.

    error = key_scale * sum_h |w_h| * (growth(dim) * sum_d |q_hd| |k_d| + growth(heads + 2) * relu(q_h . k))
    and relu(q_h . k) <= sum_d |q_hd| |k_d|.

    truncates_sums adds what Hopper's tensor cores cut off. Each step adds 32 products to the sum so far; all 33 are
    aligned to the largest and keep 13 fractional bits. So each loses less than 2^-13 M_h, M_h the largest magnitude
    among the products of a head and the sums after each step. The n = dim + dim / 32 losses of every head point to
    zero, that is in the directions of the products, and fill their range evenly (which is what the sqrt(3) is for):
            key_scale * CONFIDENCE * sqrt(n / 3) * 2^-13 * sqrt(sum_h (w_h M_h)^2)
    An emulation of the above has the root-mean-square error that was measured: 1.3e-4 of the scores at dim 128.
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
    bound = (growth(dim) + growth(num_heads + 2)) * magnitudes
    return bound + _truncation(arguments) if truncates_sums else bound


def _truncation(arguments: dict[str, Any]) -> NDArray[np.float64]:
    query, cache = reference.decode(arguments["query"]), arguments["index_cache"]
    num_tokens, _, dim = query.shape
    steps = range(TENSOR_CORE_STEP, dim + TENSOR_CORE_STEP, TENSOR_CORE_STEP)
    loss = CONFIDENCE * np.sqrt((dim + len(steps)) / 3) * TENSOR_CORE_EPS
    bound = np.zeros((num_tokens, arguments["logits_width"]))
    lengths, requests = arguments["lengths"], arguments["request_ids"]
    for request in np.unique(requests[lengths > 0]):
        rows = np.flatnonzero((requests == request) & (lengths > 0))
        slots = position_slots(np.arange(lengths[rows].max()), arguments["block_table"][request], cache)
        seen = np.flatnonzero(slots >= 0)
        keys, scales = reference.read_index_keys(cache, slots[seen])
        largest_number = np.abs(keys).max(-1)
        for t in rows:
            largest = np.abs(query[t]).max(-1)[:, None] * largest_number
            for step in steps:
                largest = np.maximum(largest, np.abs(query[t, :, :step] @ keys[:, :step].T))
            squares = np.square(arguments["folded_weights"][t]) @ np.square(largest)
            bound[t, seen] = scales * loss * np.sqrt(squares)
    return bound


def sparse_mla_bound(
    arguments: dict[str, Any], out: NDArray[np.float64], lse: NDArray[np.float64], *, rounds_weights: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds of out [T, heads, kv_lora_rank] and lse [T, heads] for arguments of sparse_mla.

    z_i      dz_i = growth(width + 2) * scale * sum_d |q_d| |row_id|
    exp      e_i  = dz_i + eps * |z_i - max| + EXP_ERROR                                 relative, of p_i
    out      sum_i p_i e_i (|row_i| + |out|) + growth(n) * (sum_i p_i |row_i| + |out|) + eps_out * |out|
    lse      sum_i p_i e_i + growth(n) + 4 eps |lse|

    rounds_weights goes with scores that take a number of an fp8 cache as e4m3 * scale, not rounded to bfloat16 as the
    values are. For powers of two that is the same; other scales move z_i by scale * (q . what the rounding took off).

    It also adds to out the n errors of p_i rounded to bfloat16, while their sum is not. Each is at most
    eps16 * p_i |row_i|. Of many only the root of the sum of squares is left; what they have in common, because many
    p_i are alike, is at most eps16 of out:
             min(sum_i eps16 p_i |row_i|, CONFIDENCE / sqrt(3) * sqrt(sum_i (eps16 p_i row_i)^2) + eps16 * |out|)
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
        moved_logits = np.zeros((query.shape[1], len(ids)))
        if rounds_weights:
            moved_logits += abs(scale) * np.abs(queries[t, :, :rank] @ _rounding(cache, ids, rank, width - rank).T)
        row = AttentionRow(queries[t], rows, scale, out[t], lse[t], moved_logits)
        out_bound[t], lse_bound[t] = row.bounds(eps_out, rounds_weights=rounds_weights)
    return out_bound, lse_bound


@dataclass(frozen=True)
class AttentionRow:
    """A token's exact attention over n rows, of which the leading numbers are the value.

    Attributes:
        queries: [heads, width] float64.
        rows: [n, width] float64.
        scale: Of the logits.
        out: [heads, value numbers] float64.
        lse: [heads] float64.
        moved_logits: [heads, n] float64, by how much more than by rounding a logit may be off.
        sinks: [heads]; None: there are none.
    """

    queries: NDArray[np.float64]
    rows: NDArray[np.float64]
    scale: float
    out: NDArray[np.float64]
    lse: NDArray[np.float64]
    moved_logits: NDArray[np.float64]
    sinks: NDArray[np.float32] | None = None

    def bounds(self, eps_out: float, *, rounds_weights: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of out and lse. A sink is one more weight, whose row is zero; its error is that of the largest logit."""
        width, n = self.rows.shape[1], len(self.rows)
        logits = self.scale * (self.queries @ self.rows.T)
        largest = logits.max(-1, keepdims=True)
        logit_error = growth(width + 2) * abs(self.scale) * (np.abs(self.queries) @ np.abs(self.rows).T)
        logit_error += self.moved_logits
        relative = logit_error + EPS32 * np.abs(logits - largest) + EXP_ERROR
        shares = np.exp(logits - self.lse[:, None])
        lse_bound = (shares * relative).sum(-1) + growth(n + 2) + 4 * EPS32 * np.abs(self.lse)

        sinks = np.full(len(self.lse), -np.inf) if self.sinks is None else self.sinks.astype(np.float64)
        whole = np.logaddexp(self.lse, sinks)
        weights = np.exp(logits - whole[:, None])
        moved = (weights * relative).sum(-1)
        has_sink = np.isfinite(sinks)
        distance = np.abs(np.where(has_sink, sinks, largest[:, 0]) - largest[:, 0])
        sink_share = np.where(has_sink, np.exp(sinks - whole), 0.0)
        moved += sink_share * (logit_error.max(-1) + EPS32 * distance + EXP_ERROR)
        values, magnitude = np.abs(self.rows[:, : self.out.shape[1]]), np.abs(self.out)
        out_bound = (weights * relative) @ values + moved[:, None] * magnitude
        out_bound += growth(n + 2) * (weights @ values + magnitude) + eps_out * magnitude
        if rounds_weights:
            lost = EPS16 * weights
            spread = CONFIDENCE / np.sqrt(3) * np.sqrt(np.square(lost) @ np.square(values)) + EPS16 * magnitude
            out_bound += np.minimum(lost @ values, spread)
        return out_bound, lse_bound


def _rounding(cache: NDArray[Any], ids: NDArray[Any], rank: int, rope_dim: int) -> NDArray[np.float64]:
    """What is lost of the latent numbers [n, kv_lora_rank] of an fp8 cache when they are rounded to bfloat16."""
    fields = LatentFields(rank, rope_dim)
    rows = cache[:, 0][ids // cache.shape[2], ids % cache.shape[2]]
    scales = np.ascontiguousarray(rows[:, fields.scale_offset : fields.rope_offset]).view(np.float32)
    spread = np.repeat(scales, LATENT_GROUP, axis=-1)[:, :rank].astype(np.float64)
    exact: NDArray[np.float64] = reference.e4m3_decode(rows[:, :rank]) * spread
    return exact - reference.read_latent_rows(cache, ids, rank, rope_dim)[:, :rank]


def _magnitudes(index_cache: NDArray[Any]) -> NDArray[Any]:
    cache = index_cache.copy()
    if cache.dtype == np.float32:
        return np.abs(cache)
    numbers = index_block_fields(cache)[0] if cache.dtype == np.uint8 else cache
    numbers &= np.array(0x7F if cache.dtype == np.uint8 else 0x7FFF, cache.dtype)
    return cache
