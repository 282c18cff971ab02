"""Section prefill8: sparse attention of prefill rows over the FP8 cache.

The peers' sparse prefill reads contiguous bfloat16 keys: vLLM brings the whole context there first. Both passes are in
one graph and make one figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from scripts.gpu_benchmark import inputs
from scripts.gpu_benchmark.decode import BOUND
from scripts.gpu_benchmark.record import OURS, PART, PEER
from scripts.gpu_benchmark.tools import Inputs, Tools, bfloat16, poisoned
from scripts.gpu_benchmark.work import Contender, Cost, Launch, Verdict, Work


@dataclass(frozen=True)
class Shape:
    rows: int
    heads: int
    context: int

    @property
    def case(self) -> str:
        return f"{self.rows} rows h{self.heads} {self.context >> 10}k"


def shapes(quick: bool) -> list[Shape]:
    contexts = (1 << 13, 1 << 15, 1 << 17)
    if quick:
        return [Shape(1024, 128, context) for context in contexts]
    return [Shape(rows, heads, n) for n in contexts for rows in (1024, 4096) for heads in (128, 64, 16)]


def works(tools: Tools) -> Iterator[Work]:
    pool = tools.pool(inputs.latent_pool, 1 << 18)
    picked: dict[tuple[int, int], Inputs] = {}
    for shape in shapes(tools.quick):
        key = (shape.rows, shape.context)
        if key not in picked:
            picked = {key: _picked(shape, pool)}
        yield work_of(shape, picked[key], tools)


def _picked(shape: Shape, pool: torch.Tensor) -> Inputs:
    """Causal: row i is the token at context - rows + i."""
    table = inputs.block_tables(pool.shape[0], 1, shape.context // inputs.BLOCK)
    limits = torch.arange(shape.context - shape.rows + 1, shape.context + 1)
    positions = inputs.chosen_positions(limits, shape.context)
    return Inputs(
        pool=pool,
        table=table,
        positions=positions[:, None],
        slots=inputs.slots_of(positions, table),
        keys=torch.empty(shape.context, inputs.QUERY, dtype=torch.bfloat16),
        starts=torch.zeros(1, dtype=torch.int32),
    )


def work_of(shape: Shape, picked: Inputs, tools: Tools) -> Work:
    """Sets differ in their queries and outputs, which are most of the bytes."""
    count = tools.timer.set_count(2.0 * shape.rows * shape.heads * (inputs.QUERY + inputs.NOPE), most=4)
    sets = [Inputs(**vars(picked), query=bfloat16(shape.rows, shape.heads, inputs.QUERY)) for _ in range(count)]
    per_row = shape.heads * (inputs.QUERY + inputs.NOPE) * 2 + inputs.TOPK * 4
    cost = Cost(
        flops=2.0 * shape.rows * shape.heads * inputs.TOPK * (inputs.QUERY + inputs.NOPE),
        num_bytes=shape.context * inputs.LATENT_ROW + shape.rows * per_row,
    )
    contenders = []
    for build in ("vllm", "sgl"):
        contenders.append(Contender(f"upconvert+{build}-flashmla", PEER, partial(peer, tools, build, True), check))
    for build in () if tools.quick else ("vllm", "sgl"):
        contenders.append(Contender(f"{build}-flashmla alone", PART, partial(peer, tools, build, False), check))
    contenders.append(Contender("ours", OURS, partial(ours, tools), check))
    return Work(shape.case, sets, contenders, cost, poison)


def poison(case: Inputs) -> None:
    case.out = None
    if hasattr(case, "ours_out"):
        case.ours_out.fill_(float("nan"))


def peer(tools: Tools, build: str, with_upconvert: bool, case: Inputs) -> Launch:
    upconvert = tools.peers.upconvert(pool=case.pool, keys=case.keys, table=case.table, starts=case.starts)
    attend = tools.peers.flashmla_prefill(build, query=case.query, keys=case.keys[:, None], positions=case.positions)
    if with_upconvert:
        case.keys.fill_(float("nan"))
    else:
        upconvert()

    def run() -> None:
        if with_upconvert:
            upconvert()
        case.out = attend()

    return run


def ours(tools: Tools, case: Inputs) -> Launch:
    case.ours_out = poisoned(*case.query.shape[:-1], inputs.NOPE)
    lse = torch.empty(case.query.shape[:-1], dtype=torch.float32)
    launch = tools.ours.sparse_mla(
        query=case.query, pool=case.pool, slots=case.slots, counts=None, out=case.ours_out, lse=lse
    )

    def run() -> None:
        launch()
        case.out = case.ours_out

    return run


def check(case: Inputs) -> Verdict:
    rows = [0, case.query.shape[0] // 2, case.query.shape[0] - 1]
    wanted = [
        inputs.attention(case.query[row].double(), inputs.latent_rows(case.pool, case.slots[row])) for row in rows
    ]
    return Verdict.of(inputs.relative_error(case.out[rows], torch.stack(wanted)), BOUND)
