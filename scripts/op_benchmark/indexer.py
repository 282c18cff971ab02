"""The indexer's ops beside matmul, relu and a weighted sum, and beside paddle.topk."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import paddle

from fastdeploy_dsa import ops
from fastdeploy_dsa.ops import reference
from scripts.op_benchmark.arguments import Arguments, arrays, checked_rows, some_rows, tensors
from scripts.op_benchmark.timing import Work
from tests.kit import checks
from tests.kit.cases import IndexerCase, TopkCase
from tests.kit.compare import assert_selects_best
from tests.kit.paddle_ops import PaddleOps
from tests.kit.tolerances import indexer_logits_bound

INDEXER_BYTES = {"fp8": 1, "bfloat16": 2, "float32": 4}


def topk_works() -> Iterator[Work]:
    """Scores of 64 rows over 128k keys."""
    topk, length, num_tokens = 2048, 131072, 64
    case = TopkCase(lengths=(length,) * num_tokens, topk=topk, width=length)
    arguments = case.arguments()
    inputs = tensors(arguments)
    logits = inputs["logits"]

    def check(result: Any) -> None:
        checks.assert_same_selection(reference.IndexSelection(*arrays(result)), reference.topk_slots(**arguments))

    yield Work(
        op="topk_slots",
        name=f"{num_tokens} x {length}, k {topk}",
        run=partial(ops.topk_slots, **inputs),
        check=check,
        peers={
            "topk": partial(paddle.topk, logits, topk),
            "topk, sorted=False": partial(paddle.topk, logits, topk, sorted=False),
        },
        num_bytes=num_tokens * (length + 2 * topk) * 4,
        num_flops=0,
        required=3.0,
    )


def score_by_paddle(query: Any, weights: Any, cache: Any, blocks: Any, length: int, rows_at_a_time: int) -> Any:
    """Gather the keys of the context once, then matmul, relu and a weighted sum; for fp8 the peer's query is float32.

    Args:
        query: [T, heads, dim] float32.
        weights: [T, heads] float32.
        cache: [num_blocks, ..] of one request in one of the formats.
        blocks: [n] block ids of the context.
        length: Keys of the context.
        rows_at_a_time: Rows whose dot products exist at a time.
    """
    dim, block_size = query.shape[-1], cache.shape[1]
    gathered = paddle.gather(cache, blocks)
    scales = None
    if gathered.dtype == paddle.uint8:
        flat = gathered.reshape([len(blocks), -1])
        numbers = flat[:, : block_size * dim].contiguous().view("float8_e4m3fn").astype("float32")
        keys = numbers.reshape([-1, dim])[:length]
        scales = flat[:, block_size * dim :].contiguous().view("float32").reshape([-1])[:length]
    else:
        keys = gathered.astype("float32").reshape([-1, dim])[:length]
    scores = []
    for first in range(0, len(query), rows_at_a_time):
        part = query[first : first + rows_at_a_time]
        dots = paddle.matmul(part, keys, transpose_y=True)
        summed = paddle.matmul(weights[first : first + rows_at_a_time].unsqueeze(1), paddle.nn.functional.relu(dots))
        scores.append(summed.squeeze(1) if scales is None else summed.squeeze(1) * scales)
    return scores


def indexer_case(num_tokens: int, cache_format: Any) -> IndexerCase:
    """Query rows of one request over 32k keys, 64 heads of 128."""
    return IndexerCase(lengths=(32768,) * num_tokens, requests=(0,) * num_tokens, cache_format=cache_format)


def indexer_works() -> Iterator[Work]:
    """Decode with one row, prefill with 64."""
    for cache_format in ("fp8", "float32"):
        for num_tokens in (1, 64):
            yield indexer_work(num_tokens, cache_format)


def indexer_work(num_tokens: int, cache_format: str) -> Work:
    case = indexer_case(num_tokens, cache_format)
    length, heads, dim = case.lengths[0], case.index_n_heads, case.index_head_dim
    arguments = case.arguments()
    inputs = tensors(arguments)
    rows = checked_rows(num_tokens)
    peer_query = paddle.to_tensor(reference.decode(arguments["query"]))
    blocks = paddle.to_tensor(arguments["block_table"][0, : length // case.block_size])

    def check(result: Any) -> None:
        checks.check_logits(PaddleOps(), some_rows(arguments, rows), arrays(result)[rows])

    peers = {
        f"{n} rows at a time": partial(
            score_by_paddle, peer_query, inputs["folded_weights"], inputs["index_cache"], blocks, length, n
        )
        for n in (1, 4, 16)
        if n <= num_tokens
    }
    key_bytes = length * (dim * INDEXER_BYTES[cache_format] + (4 if cache_format == "fp8" else 0))
    return Work(
        op="indexer_logits",
        name=f"{num_tokens} x {length} keys, {heads} x {dim}, {cache_format}",
        run=partial(ops.indexer_logits, **inputs),
        check=check,
        peers=peers,
        num_bytes=key_bytes + num_tokens * (length * 4 + heads * dim * INDEXER_BYTES[cache_format]),
        num_flops=num_tokens * length * heads * 2 * dim,
        required=4.0,
    )


def index_select_works() -> Iterator[Work]:
    """Scores and top-k in one op."""
    for num_tokens in (1, 64):
        case, topk = indexer_case(num_tokens, "fp8"), 2048
        arguments = case.selection_arguments(topk=topk)
        scoring = case.arguments()
        rows = checked_rows(num_tokens)

        def check(
            result: Any, scoring: Arguments = scoring, rows: list[int] = rows, length: int = case.lengths[0]
        ) -> None:
            positions = arrays(result)[0][rows]
            part = some_rows(scoring, rows)
            exact, bound = reference.indexer_logits(**part), indexer_logits_bound(part)
            for i, row in enumerate(rows):
                assert_selects_best(positions[i], exact[i], bound[i], length, f"positions[{row}]")

        yield Work(
            op="index_select",
            name=f"{num_tokens} x {case.lengths[0]} keys, k {topk}, fp8",
            run=partial(ops.index_select, **tensors(arguments)),
            check=check,
            peers={},
            num_bytes=case.lengths[0] * (case.index_head_dim + 4) + num_tokens * topk * 8,
            num_flops=num_tokens * case.lengths[0] * case.index_n_heads * 2 * case.index_head_dim,
        )
