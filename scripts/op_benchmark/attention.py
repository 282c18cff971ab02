"""sparse_mla beside gather, decode, matmul, softmax and matmul."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import paddle

from fastdeploy_dsa import ops
from fastdeploy_dsa.ops import reference
from scripts.op_benchmark.arguments import arrays, checked_rows, some_rows, tensors
from scripts.op_benchmark.timing import Action, Work
from tests.kit import checks
from tests.kit.cases import SparseMlaCase


def latent_rows_from_fp8(packed: Any, rank: int) -> Any:
    """Float32 rows from gathered fp8 rows by Paddle's casts; exact for power-of-two scales."""
    groups = rank // reference.caches.LATENT_GROUP
    scale_end = rank + groups * reference.caches.SCALE_BYTES
    numbers = packed[:, :rank].contiguous().view("float8_e4m3fn").astype("float32")
    scales = packed[:, rank:scale_end].contiguous().view("float32")
    rope = packed[:, scale_end:].contiguous().view("bfloat16").astype("float32")
    latent = numbers.reshape([-1, groups, reference.caches.LATENT_GROUP]) * scales.unsqueeze(-1)
    return paddle.concat([latent.reshape([-1, rank]), rope], axis=-1)


def attend_by_paddle(query: Any, flat_cache: Any, slot_ids: Any, rank: int, scale: float) -> Any:
    """Gather, decode, matmul, softmax, matmul."""
    num_tokens, topk = slot_ids.shape
    rows = paddle.gather(flat_cache, slot_ids.flatten())
    if rows.dtype == paddle.uint8:
        rows = latent_rows_from_fp8(rows, rank)
    rows = rows.astype("float32").reshape([num_tokens, topk, query.shape[-1]])
    logits = paddle.matmul(query, rows, transpose_y=True) * scale
    # All columns: slicing the values out first would copy them.
    return paddle.matmul(paddle.nn.functional.softmax(logits, axis=-1), rows)[..., :rank]


def attend_row_by_row(query: Any, flat_cache: Any, slot_ids: Any, rank: int, scale: float) -> Any:
    """The same, one row at a time: its gathered keys stay in the caches."""
    return [
        attend_by_paddle(query[t : t + 1], flat_cache, slot_ids[t : t + 1], rank, scale) for t in range(len(query))
    ]


def sparse_mla_works() -> Iterator[Work]:
    """Rows of 2048 slots; 16 heads are one rank of eight."""
    for cache_format in ("float32", "bfloat16", "fp8"):
        for num_tokens in (1, 8, 64):
            # One row over a cold cache that needs no decoding reaches 4 to 5 times: shown, not promised.
            is_promised = num_tokens > 1 or cache_format == "fp8"
            yield from sparse_mla_work(cache_format, num_tokens, 16, required=5.0 if is_promised else None)
    for num_heads in (64, 128):
        for num_tokens in (1, 8):
            yield from sparse_mla_work("fp8", num_tokens, num_heads)
    for cache_format in ("bfloat16", "fp8"):
        yield from sparse_mla_work(cache_format, 8, 16, query_format="bfloat16")


def sparse_mla_work(
    cache_format: Any, num_tokens: int, num_heads: int, *, query_format: Any = "float32", required: float | None = None
) -> Iterator[Work]:
    topk, rank, width = 2048, 512, 576
    case = SparseMlaCase(
        num_tokens=num_tokens,
        num_heads=num_heads,
        topk=topk,
        query_format=query_format,
        cache_format=cache_format,
        invalid_every=0,
        num_slots=16384,
        counts=(topk,) * num_tokens,
    )
    arguments = case.arguments()
    inputs = tensors(arguments)
    cache, scale = arguments["latent_cache"], arguments["softmax_scale"]
    rows = checked_rows(num_tokens)

    def check(result: Any) -> None:
        out, lse = arrays(result)
        checks.check_attention(some_rows(arguments, rows), out[rows], lse[rows])

    flat = inputs["latent_cache"].reshape([-1, cache.shape[-1]])
    peer_query = inputs["query"].astype("float32")
    query_bytes = num_tokens * num_heads * (width + rank) * arguments["query"].itemsize
    row_bytes = cache.shape[-1] * cache.itemsize
    work = Work(
        op="sparse_mla",
        name=f"{num_tokens} x {num_heads} heads x {topk} slots, {cache_format}; query {query_format}",
        run=partial(ops.sparse_mla, **inputs),
        check=check,
        peers=attention_peers(peer_query, flat, inputs["slot_ids"], rank, scale),
        num_bytes=query_bytes + num_tokens * topk * (row_bytes + 4),
        num_flops=num_tokens * num_heads * topk * 2 * (width + rank),
        required=required,
    )
    yield work
    if cache_format == "fp8" and required:
        slots = np.arange(cache.shape[0] * cache.shape[2])
        decoded = paddle.to_tensor(reference.read_latent_rows(cache, slots, rank, width - rank))
        peers = attention_peers(peer_query, decoded, inputs["slot_ids"], rank, scale)
        yield replace(work, name=f"{work.name}; peer: float32 cache", peers=peers, required=None)


def attention_peers(query: Any, flat_cache: Any, slot_ids: Any, rank: int, scale: float) -> dict[str, Action]:
    """Batched, and row by row where that differs."""
    peers = {"batched": partial(attend_by_paddle, query, flat_cache, slot_ids, rank, scale)}
    if len(query) > 1:
        peers["row by row"] = partial(attend_row_by_row, query, flat_cache, slot_ids, rank, scale)
    return peers
