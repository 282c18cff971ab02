"""Bounds of compressed attention; see tolerances.py for what they are made from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference.compressed import pooled_entry, rotated, state_place, visible_rows
from tests.kit.tolerances import EPS16, EPS32, EXP_ERROR, AttentionRow, growth

Float64Array = NDArray[np.float64]

TINY = 2.0**-126  # what float32 may lose of a number by having no smaller normal ones


def compressed_mla_bound(
    arguments: dict[str, Any], out: Float64Array, lse: Float64Array, *, rounds_weights: bool = False
) -> tuple[Float64Array, Float64Array]:
    """Bounds of out [T, heads, head_dim] and lse [T, heads]: those of sparse_mla with a sink, all of a row a value."""
    query = arguments["query"]
    queries = reference.decode(query).astype(np.float64)
    scale = float(np.float32(arguments["softmax_scale"]))
    out_bound, lse_bound = np.zeros(out.shape), np.zeros(lse.shape)
    for t in range(len(query)):
        rows = rows_of_token(arguments, t).astype(np.float64)
        if not len(rows):
            continue
        row = AttentionRow(
            queries[t], rows, scale, out[t], lse[t], np.zeros((query.shape[1], len(rows))), arguments["sinks"]
        )
        eps_out = EPS16 if query.dtype == np.uint16 else EPS32
        out_bound[t], lse_bound[t] = row.bounds(eps_out, rounds_weights=rounds_weights)
    return out_bound + TINY, lse_bound


def rows_of_token(arguments: dict[str, Any], token: int) -> NDArray[np.float32]:
    """What a token attends to: window rows, then entries."""
    head_dim, rope_dim = arguments["query"].shape[2], arguments["rope_dim"]
    parts = [
        visible_rows(
            arguments[f"{part}_cache"],
            arguments[f"{part}_slots"],
            arguments[f"{part}_counts"],
            arguments[f"{part}_block_rows"],
            token,
            head_dim,
            rope_dim,
        )
        for part in ("window", "entry")
        if arguments[f"{part}_cache"] is not None
    ]
    return np.concatenate(parts)


def entry_and_bound(arguments: dict[str, Any], t: int) -> tuple[Float64Array, Float64Array]:
    """The exact entry [head_dim] that row t makes of the states in arguments, and how far float32 may be off.

    weight   e_i = eps * |score_i - max| + EXP_ERROR                                      relative
    pooled   sum_i p_i e_i (|value_i| + |pooled|) + growth(n + 2) * (sum_i p_i |value_i| + |pooled|)
    norm     the root of the mean square is off by the root mean square of that, and by growth(dim + 4) of itself
    rotated  |cos| and |sin| of both numbers' errors, and three roundings of the two products
    """
    ring, cache = arguments["state_table"][arguments["request_ids"][t]], arguments["state_cache"]
    position, overlap, ratio = int(arguments["positions"][t]), arguments["overlap"], arguments["ratio"]
    pooled = pooled_entry(position, ring, cache, ratio, overlap)
    error = _pooling_error(position, ring, cache, ratio, overlap, pooled)
    weight = arguments["norm_weight"].astype(np.float64)
    size = np.sqrt((pooled**2).mean() + np.float64(np.float32(arguments["eps"])))
    entry = pooled / size * weight
    relative = np.sqrt((error**2).mean()) / size + growth(len(pooled) + 4)
    bound = np.abs(weight) / size * error + np.abs(entry) * relative
    first = len(entry) - arguments["rope_dim"]
    cos, sin = arguments["cos"][t].astype(np.float64), arguments["sin"][t].astype(np.float64)
    turned = _turned_magnitudes(np.abs(entry[first:]), cos, sin)
    bound[first:] = _turned_magnitudes(bound[first:], cos, sin) + 3 * EPS32 * turned
    entry[first:] = rotated(entry[first:], cos, sin)
    return entry, bound + TINY


def _turned_magnitudes(x: Float64Array, cos: Float64Array, sin: Float64Array) -> Float64Array:
    """|x[2i]| |cos| + |x[2i + 1]| |sin| and the other way round, along the last axis."""
    even, odd, c, s = x[..., ::2], x[..., 1::2], np.abs(cos), np.abs(sin)
    return np.stack([even * c + odd * s, odd * c + even * s], -1).reshape(x.shape)


def _pooling_error(
    position: int,
    ring: NDArray[np.int32],
    cache: NDArray[np.float32],
    ratio: int,
    overlap: int,
    pooled: Float64Array,
) -> Float64Array:
    width, head_dim = cache.shape[2] // 2, len(pooled)
    members = range(max(position - overlap * ratio + 1, 0), position + 1)
    starts = [head_dim if overlap == 2 and member > position - ratio else 0 for member in members]
    states = [cache[state_place(member, ring, cache)].astype(np.float64) for member in members]
    values = np.stack([state[at : at + head_dim] for state, at in zip(states, starts, strict=True)])
    scores = np.stack([state[width + at : width + at + head_dim] for state, at in zip(states, starts, strict=True)])
    distance = np.abs(scores - scores.max(0))
    shares = np.exp(-distance)
    shares /= shares.sum(0)
    moved = shares * (EPS32 * distance + EXP_ERROR)
    sizes = np.abs(values)
    bound: Float64Array = (moved * (sizes + np.abs(pooled))).sum(0)
    return bound + growth(len(states) + 2) * ((shares * sizes).sum(0) + np.abs(pooled))


def inverse_rope_bound(arguments: dict[str, Any]) -> Float64Array:
    """Of the rotated numbers [T, heads, rope_dim]: three roundings of the products, one to the format of x."""
    x, cos, sin = arguments["x"], arguments["cos"].astype(np.float64), arguments["sin"].astype(np.float64)
    numbers = reference.decode(x[..., -2 * cos.shape[1] :]).astype(np.float64)
    products = _turned_magnitudes(np.abs(numbers), cos[:, None], sin[:, None])
    turned = np.abs(rotated(numbers, cos[:, None], -sin[:, None]))
    return 3 * EPS32 * products + (EPS16 if x.dtype == np.uint16 else EPS32) * turned + TINY
