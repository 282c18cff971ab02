"""compressed_mla beside gathers, decoding, matmul, softmax with a sink and matmul."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import paddle

from fastdeploy_dsa import ops
from fastdeploy_dsa.ops.reference.compressed import VALUE_GROUP, compressed_block_fields
from scripts.op_benchmark.arguments import Arguments, arrays, checked_rows, some_rows, tensors
from scripts.op_benchmark.timing import Work
from tests.kit.compressed_cases import CompressedMlaCase
from tests.kit.compressed_checks import check_compressed_attention
from tests.kit.paddle_ops import PaddleOps

HEAD_DIM, ROPE_DIM = 512, 64
ROW_BYTES = {"fp8": 584, "bfloat16": 1024, "float32": 2048}


def compressed_mla_works() -> Iterator[Work]:
    """A window of 128 rows with 512 selected entries, and with none; 16 heads are one rank of several."""
    for cache_format in ("float32", "bfloat16", "fp8"):
        for num_tokens in (1, 8, 64):
            # One row over a cold cache that needs no decoding is close to the bytes for either side: not promised.
            is_promised = num_tokens > 1 or cache_format == "fp8"
            yield compressed_mla_work(cache_format, num_tokens, 16, required=4.0 if is_promised else None)
    for num_tokens in (1, 8, 64):
        yield compressed_mla_work("fp8", num_tokens, 64, required=4.0)
    # All heads over float32 rows: ours is close to the processor's multiply-adds, which bounds the ratio.
    yield compressed_mla_work("float32", 8, 64)
    yield compressed_mla_work("fp8", 8, 64, query_format="bfloat16")
    yield compressed_mla_work("fp8", 64, 64, entry_width=0)


def compressed_mla_work(
    cache_format: Any,
    num_tokens: int,
    num_heads: int,
    *,
    entry_width: int = 512,
    query_format: Any = "float32",
    required: float | None = None,
) -> Work:
    """One row of the table; entries are those of a ratio-4 layer."""
    case = CompressedMlaCase(
        num_tokens=num_tokens,
        num_heads=num_heads,
        window_width=128,
        entry_width=entry_width,
        entry_block_rows=64,
        cache_format=cache_format,
        query_format=query_format,
        window_counts=(128,) * num_tokens,
        entry_counts=(entry_width,) * num_tokens,
        invalid_every=0,
    )
    arguments = case.arguments()
    inputs = tensors(arguments)
    rows = checked_rows(num_tokens)

    def check(result: Any) -> None:
        out, lse = arrays(result)
        check_compressed_attention(PaddleOps(), some_rows(arguments, rows), out[rows], lse[rows])

    num_rows = num_tokens * (128 + entry_width)
    query_bytes = 2 * num_tokens * num_heads * HEAD_DIM * arguments["query"].itemsize
    peers = {"batched": partial(attend_by_paddle, peer_inputs(arguments), range(num_tokens))}
    if num_tokens > 1:
        peers["row by row"] = partial(attend_row_by_row, peer_inputs(arguments))
    return Work(
        op="compressed_mla",
        name=f"{num_tokens} x {num_heads} heads x 128 + {entry_width} rows, {cache_format}; query {query_format}",
        run=partial(ops.compressed_mla, **inputs),
        check=check,
        peers=peers,
        num_bytes=query_bytes + num_rows * (ROW_BYTES[cache_format] + 4),
        num_flops=num_rows * num_heads * 4 * HEAD_DIM,
        required=required,
    )


def peer_inputs(arguments: Arguments) -> Arguments:
    """Tensors in the form that suits Paddle best: one array of rows a cache, fp8 scales in another."""
    parts = [part for part in ("window", "entry") if arguments[f"{part}_cache"] is not None]
    return {
        "query": tensors({"query": arguments["query"]})["query"].astype("float32"),
        "sinks": paddle.to_tensor(arguments["sinks"]),
        "scale": arguments["softmax_scale"],
        "slots": [paddle.to_tensor(arguments[f"{part}_slots"]) for part in parts],
        "rows": [flat_rows(arguments[f"{part}_cache"], arguments[f"{part}_block_rows"]) for part in parts],
    }


def flat_rows(cache: Any, block_rows: int) -> tuple[Any, ...]:
    """Every row of a cache: numbers, or data and scales of an fp8 cache."""
    if cache.dtype != np.uint8:
        return (tensors({"cache": cache})["cache"].reshape([-1, HEAD_DIM]),)
    fields = compressed_block_fields(cache, block_rows, HEAD_DIM, ROPE_DIM)
    return tuple(paddle.to_tensor(np.ascontiguousarray(field).reshape(-1, field.shape[2])) for field in fields)


def gathered(rows: tuple[Any, ...], slots: Any) -> Any:
    """Float32 rows [T, n, HEAD_DIM] of slots; fp8 by Paddle's casts."""
    num_tokens, width = slots.shape
    parts = [paddle.gather(part, slots.flatten()) for part in rows]
    if len(parts) == 1:
        return parts[0].astype("float32").reshape([num_tokens, width, HEAD_DIM])
    data, stored = parts
    value_dim = HEAD_DIM - ROPE_DIM
    groups = value_dim // VALUE_GROUP
    numbers = data[:, :value_dim].contiguous().view("float8_e4m3fn").astype("float32")
    scales = paddle.pow(paddle.to_tensor(2.0), stored[:, :groups].astype("float32") - 127.0)
    values = numbers.reshape([-1, groups, VALUE_GROUP]) * scales.unsqueeze(-1)
    rotated = data[:, value_dim:].contiguous().view("bfloat16").astype("float32")
    found = paddle.concat([values.reshape([-1, value_dim]), rotated], axis=-1)
    return found.reshape([num_tokens, width, HEAD_DIM])


def attend_by_paddle(inputs: Arguments, tokens: range) -> Any:
    """Gather, matmul, a softmax with the sink as one more column, matmul."""
    part = slice(tokens.start, tokens.stop)
    query = inputs["query"][part]
    found = [gathered(rows, slots[part]) for rows, slots in zip(inputs["rows"], inputs["slots"], strict=True)]
    rows = found[0] if len(found) == 1 else paddle.concat(found, axis=1)
    logits = paddle.matmul(query, rows, transpose_y=True) * inputs["scale"]
    sinks = inputs["sinks"].reshape([1, -1, 1]).expand([len(query), -1, 1])
    weights = paddle.nn.functional.softmax(paddle.concat([logits, sinks], axis=-1), axis=-1)[..., :-1]
    return paddle.matmul(weights, rows)


def attend_row_by_row(inputs: Arguments) -> Any:
    """The same, one row at a time: its gathered rows stay in the caches."""
    return [attend_by_paddle(inputs, range(t, t + 1)) for t in range(len(inputs["query"]))]
