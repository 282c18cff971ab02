"""Section decode: sparse attention of decode rows over the FP8 cache, the selected slots given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.gpu_benchmark import inputs
from scripts.gpu_benchmark.record import OTHER_FORMAT, OURS, PEER
from scripts.gpu_benchmark.tools import Inputs, Tools, bfloat16, poisoned
from scripts.gpu_benchmark.work import Contender, Cost, Launch, Verdict, Work

BOUND = 1.2e-2  # bfloat16 results of sums of bfloat16 products
BFLOAT16_TOKENS = 1 << 21  # of the pool of the second opinions


@dataclass(frozen=True)
class Shape:
    requests: int
    next_n: int
    heads: int
    context: int

    @property
    def case(self) -> str:
        return f"b{self.requests} s{self.next_n} h{self.heads} {self.context >> 10}k"

    @property
    def rows(self) -> int:
        return self.requests * self.next_n


def shapes(quick: bool) -> list[Shape]:
    if quick:
        one = [Shape(1, 1, heads, 1 << 15) for heads in (128, 64, 32, 16)]
        return one + [Shape(64, 1, heads, 1 << 15) for heads in (128, 64, 16)]
    found = [
        Shape(requests, next_n, heads, 1 << 15)
        for requests in (1, 8, 32, 64, 128)
        for next_n in (1, 2)
        for heads in (128, 64, 32, 16, 8)
    ]
    found += [Shape(b, 1, heads, context) for context in (1 << 12, 1 << 17) for b in (1, 64) for heads in (128, 16)]
    return found


def works(tools: Tools) -> Iterator[Work]:
    for shape in shapes(tools.quick):
        yield work_of(shape, tools)


def work_of(shape: Shape, tools: Tools) -> Work:
    pool = tools.pool(inputs.latent_pool, 1 << (21 if tools.quick else 24))
    sets = _sets(shape, pool, tools)
    contenders = [
        Contender("vllm-flashmla", PEER, tools.peers.flashmla_decode("vllm"), check),
        Contender("sgl-flashmla", PEER, tools.peers.flashmla_decode("sgl"), check),
        Contender("ours", OURS, partial(ours, tools), check),
    ]
    has_second_opinion = (
        shape.next_n == 1 and shape.context == 1 << 15 and shape.requests in (1, 8, 64) and shape.heads != 8
    )
    if has_second_opinion and not tools.quick:
        keys = tools.pool(bfloat16_pool, BFLOAT16_TOKENS)
        cost = _cost(shape, row_bytes=inputs.QUERY * 2)
        contenders += [
            Contender(
                f"{name} bf16 cache", OTHER_FORMAT, partial(make, tools, keys), partial(check_bfloat16, keys), cost
            )
            for name, make in SECOND_OPINIONS.items()
        ]
    return Work(shape.case, sets, contenders, _cost(shape, row_bytes=inputs.LATENT_ROW), poison)


def _cost(shape: Shape, row_bytes: int) -> Cost:
    """Rows of one request share the slots that both drew: their expected number counts once."""
    distinct = shape.context * (1 - (1 - inputs.TOPK / shape.context) ** shape.next_n)
    per_row = shape.heads * (inputs.QUERY + inputs.NOPE) * 2 + inputs.TOPK * 4
    return Cost(
        flops=2.0 * shape.rows * shape.heads * inputs.TOPK * (inputs.QUERY + inputs.NOPE),
        num_bytes=shape.requests * distinct * row_bytes + shape.rows * per_row,
    )


def _sets(shape: Shape, pool: Tensor, tools: Tools) -> list[Inputs]:
    count = tools.timer.set_count(shape.rows * inputs.TOPK * inputs.LATENT_ROW)
    tables = inputs.block_tables(pool.shape[0], count * shape.requests, shape.context // inputs.BLOCK)
    limits = torch.full((count * shape.rows,), shape.context)
    positions = inputs.chosen_positions(limits, shape.context)
    slots = inputs.slots_of(positions, tables.repeat_interleave(shape.next_n, 0))
    return [
        Inputs(
            query=bfloat16(shape.requests, shape.next_n, shape.heads, inputs.QUERY),
            pool=pool,
            slots=part,
        )
        for part in slots.view(count, shape.requests, shape.next_n, inputs.TOPK)
    ]


def poison(case: Inputs) -> None:
    case.out = None
    if hasattr(case, "ours_out"):
        case.ours_out.fill_(float("nan"))


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


def _error(case: Inputs, rows_of: Callable[[Tensor], Tensor]) -> Verdict:
    """Over all rows of the first and the last request."""
    found, wanted = [], []
    for request in sorted({0, case.query.shape[0] - 1}):
        for row in range(case.query.shape[1]):
            found.append(case.out[request, row])
            keys = rows_of(case.slots[request, row])
            wanted.append(inputs.attention(case.query[request, row].double(), keys))
    return Verdict.of(inputs.relative_error(torch.stack(found), torch.stack(wanted)), BOUND)


def check(case: Inputs) -> Verdict:
    return _error(case, partial(inputs.latent_rows, case.pool))


# Kernels over a bfloat16 cache, 1152 bytes a token


def bfloat16_pool(tokens: int) -> Tensor:
    return bfloat16(tokens, inputs.QUERY)


def check_bfloat16(keys: Tensor, case: Inputs) -> Verdict:
    return _error(case, lambda slots: keys[slots.long() % keys.shape[0]].double())


def _second_opinion(case: Inputs, run: Callable[[], Any]) -> Launch:
    def launch() -> None:
        case.out = run().view(*case.query.shape[:-1], inputs.NOPE)

    return launch


def _flattened(case: Inputs, keys: Tensor) -> tuple[Tensor, Tensor]:
    rows = case.query.shape[0] * case.query.shape[1]
    return case.query.view(rows, -1, inputs.QUERY), (case.slots % keys.shape[0]).view(rows, inputs.TOPK)


def _fa3(tools: Tools, keys: Tensor, case: Inputs) -> Launch:
    query, slots = _flattened(case, keys)
    return _second_opinion(case, tools.peers.fa3_latent(query=query, keys=keys, slots=slots))


def _flashmla(build: str, tools: Tools, keys: Tensor, case: Inputs) -> Launch:
    query, slots = _flattened(case, keys)
    prefill = tools.peers.flashmla_prefill(build, query=query, keys=keys[:, None], positions=slots[:, None])
    return _second_opinion(case, lambda: prefill().contiguous() if query.shape[1] < 64 else prefill())


SECOND_OPINIONS: dict[str, Callable[[Tools, Tensor, Inputs], Launch]] = {
    "fa3": _fa3,
    "vllm-flashmla": partial(_flashmla, "vllm"),
    "sgl-flashmla": partial(_flashmla, "sgl"),
}
