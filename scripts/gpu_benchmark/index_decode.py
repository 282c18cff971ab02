"""Section idxdec: index scores of decode rows over their paged keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from scripts.gpu_benchmark import inputs
from scripts.gpu_benchmark.record import OURS, PEER
from scripts.gpu_benchmark.tools import Inputs, Tools, index_queries, poisoned
from scripts.gpu_benchmark.work import Contender, Cost, Launch, Verdict, Work

BOUND = 2e-3


@dataclass(frozen=True)
class Shape:
    requests: int
    next_n: int
    context: int
    ragged: bool = False  # lengths drawn from 1k up to the context

    @property
    def case(self) -> str:
        return f"b{self.requests} n{self.next_n} {'1-' if self.ragged else ''}{self.context >> 10}k"


def shapes(quick: bool) -> list[Shape]:
    if quick:
        small = [Shape(requests, 1, context) for requests in (1, 8) for context in (1 << 12, 1 << 15, 1 << 17)]
        return small + [Shape(64, 1, context) for context in (1 << 15, 1 << 16, 1 << 17)]
    contexts = (1 << 12, 1 << 14, 1 << 15, 1 << 16, 1 << 17)
    found = [Shape(b, next_n, context) for b in (1, 8, 32, 64, 128) for context in contexts for next_n in (1, 2)]
    return found + [Shape(requests, 1, 1 << 17, True) for requests in (8, 32, 64, 128)]


def works(tools: Tools) -> Iterator[Work]:
    for shape in shapes(tools.quick):
        yield work_of(shape, tools)


def work_of(shape: Shape, tools: Tools) -> Work:
    pool = tools.pool(inputs.index_pool, 1 << (23 if tools.quick else 24))
    count = tools.timer.set_count(shape.requests * shape.context * inputs.INDEX_ROW)
    tables = inputs.block_tables(pool.shape[0], count * shape.requests, shape.context // inputs.BLOCK)
    lengths = (torch.arange(1 - shape.next_n, 1) + shape.context).int().repeat(shape.requests, 1)
    if shape.ragged:
        lengths = torch.randint(1024, shape.context + 1, (shape.requests, 1)).int()
    rows = shape.requests * shape.next_n
    sets = [
        Inputs(
            query=index_queries(shape.requests, shape.next_n),
            weights=torch.randn(rows, inputs.INDEX_HEADS),
            table=table,
            lengths=lengths,
            request_ids=torch.arange(rows, dtype=torch.int32) // shape.next_n,
            pool=pool,
            context=shape.context,
        )
        for table in tables.view(count, shape.requests, -1)
    ]
    keys = int(lengths[:, -1].sum())
    cost = Cost(
        flops=2.0 * inputs.INDEX_HEADS * inputs.INDEX_DIM * int(lengths.sum()),
        num_bytes=keys * inputs.INDEX_ROW
        + rows * inputs.INDEX_HEADS * (inputs.INDEX_DIM + 4)
        + int(lengths.sum()) * 4,
        unit="fp8",
    )
    contenders = [
        Contender("deepgemm", PEER, partial(peer, tools), check),
        Contender("ours", OURS, partial(ours, tools), check),
    ]
    return Work(shape.case, sets, contenders, cost, poison)


def poison(case: Inputs) -> None:
    case.out = None
    if hasattr(case, "ours_out"):
        case.ours_out.fill_(float("nan"))


def peer(tools: Tools, case: Inputs) -> Launch:
    """Its plan of the step is made before."""
    logits = tools.peers.paged_logits(
        query=case.query,
        weights=case.weights,
        pool=case.pool,
        table=case.table,
        lengths=case.lengths,
        plan=tools.peers.schedule(case.lengths),
        max_length=case.context,
    )

    def run() -> None:
        case.out = logits()

    return run


def ours(tools: Tools, case: Inputs) -> Launch:
    case.ours_out = poisoned(case.weights.shape[0], case.context, dtype=torch.float32)
    launch = tools.ours.indexer_logits(
        query=case.query,
        weights=case.weights,
        pool=case.pool,
        table=case.table,
        request_ids=case.request_ids,
        lengths=case.lengths.view(-1),
        logits=case.ours_out,
    )

    def run() -> None:
        launch()
        case.out = case.ours_out

    return run


def check(case: Inputs) -> Verdict:
    """All rows of the first and the last request."""
    worst, (requests, next_n) = 0.0, case.query.shape[:2]
    for request in sorted({0, requests - 1}):
        keys = inputs.index_keys(case.pool, case.table[request])
        for row in range(next_n):
            length = int(case.lengths[request, row])
            weights = case.weights[request * next_n + row].double()
            wanted = inputs.index_scores(case.query[request, row].double(), weights, keys[:length])
            worst = max(worst, inputs.relative_error(case.out[request * next_n + row, :length], wanted))
    return Verdict.of(worst, BOUND)
