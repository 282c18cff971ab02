"""Section idxpre: index scores of prefill rows.

The peers gather the paged keys first: that pass and DeepGEMM's are in one graph and make one figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from scripts.gpu_benchmark import inputs
from scripts.gpu_benchmark.index_decode import BOUND, poison
from scripts.gpu_benchmark.record import OURS, PART, PEER
from scripts.gpu_benchmark.tools import Inputs, Tools, index_queries, poisoned
from scripts.gpu_benchmark.work import Contender, Cost, Launch, Verdict, Work


@dataclass(frozen=True)
class Shape:
    rows: int
    context: int

    @property
    def case(self) -> str:
        return f"{self.rows} x {self.context >> 10}k"


def shapes(quick: bool) -> list[Shape]:
    if quick:
        return [Shape(2048, context) for context in (1 << 12, 1 << 14, 1 << 16)]
    return [Shape(rows, 1 << power) for rows in (2048, 4096) for power in range(12, 17)]


def works(tools: Tools) -> Iterator[Work]:
    for shape in shapes(tools.quick):
        yield work_of(shape, tools)


def work_of(shape: Shape, tools: Tools) -> Work:
    """Causal: row i is the token at context - rows + i. The scores alone push the inputs out of the L2, but for 4k."""
    pool = tools.pool(inputs.index_pool, 1 << 21)
    count = tools.timer.set_count(shape.rows * shape.context * 4.0, most=4)
    tables = inputs.block_tables(pool.shape[0], count, shape.context // inputs.BLOCK)
    sets = [_inputs(shape, pool, table) for table in tables.view(count, 1, -1)]
    scores = int(sets[0].lengths.long().sum())
    cost = Cost(
        flops=2.0 * inputs.INDEX_HEADS * inputs.INDEX_DIM * scores,
        num_bytes=shape.rows * inputs.INDEX_HEADS * (inputs.INDEX_DIM + 4)
        + shape.context * inputs.INDEX_ROW
        + scores * 4,
        unit="fp8",
    )
    contenders = [
        Contender("gather+deepgemm", PEER, partial(peer, tools, True), check),
        Contender("deepgemm alone", PART, partial(peer, tools, False), check),
        Contender("ours", OURS, partial(ours, tools), check),
    ]
    return Work(shape.case, sets, contenders, cost, poison)


def _inputs(shape: Shape, pool: torch.Tensor, table: torch.Tensor) -> Inputs:
    return Inputs(
        query=index_queries(shape.rows),
        weights=torch.randn(shape.rows, inputs.INDEX_HEADS),
        pool=pool,
        table=table,
        request_ids=torch.zeros(shape.rows, dtype=torch.int32),
        starts=torch.zeros(shape.rows, dtype=torch.int32),
        lengths=torch.arange(shape.context - shape.rows + 1, shape.context + 1, dtype=torch.int32),
        key_starts=torch.tensor([0, shape.context], dtype=torch.int32),
        keys=torch.zeros(shape.context, inputs.INDEX_DIM, dtype=torch.uint8).view(inputs.FP8),
        scales=torch.zeros(shape.context, 4, dtype=torch.uint8),
    )


def peer(tools: Tools, with_gather: bool, case: Inputs) -> Launch:
    gather = tools.peers.gather_index_keys(
        pool=case.pool, keys=case.keys, scales=case.scales, table=case.table, starts=case.key_starts
    )
    logits = tools.peers.contiguous_logits(
        query=case.query,
        weights=case.weights,
        keys=case.keys,
        scales=case.scales.view(torch.float32).view(-1),
        starts=case.starts,
        ends=case.lengths,
    )
    if with_gather:
        case.scales.fill_(0xFF)
    else:
        gather()

    def run() -> None:
        if with_gather:
            gather()
        case.out = logits()

    return run


def ours(tools: Tools, case: Inputs) -> Launch:
    case.ours_out = poisoned(case.weights.shape[0], case.keys.shape[0], dtype=torch.float32)
    launch = tools.ours.indexer_logits(
        query=case.query,
        weights=case.weights,
        pool=case.pool,
        table=case.table,
        request_ids=case.request_ids,
        lengths=case.lengths,
        logits=case.ours_out,
    )

    def run() -> None:
        launch()
        case.out = case.ours_out

    return run


def check(case: Inputs) -> Verdict:
    keys = inputs.index_keys(case.pool, case.table[0])
    found, wanted = [], []
    for row in (0, case.weights.shape[0] // 2, case.weights.shape[0] - 1):
        length = int(case.lengths[row])
        found.append(case.out[row, :length])
        wanted.append(inputs.index_scores(case.query[row].double(), case.weights[row].double(), keys[:length]))
    return Verdict.of(inputs.relative_error(torch.cat(found), torch.cat(wanted)), BOUND)
