"""Section topk: the 2048 largest of float32 rows.

The peers return positions in any order. Ours also sorts them, maps them to slots, counts them and fills the tails, in
the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.gpu_benchmark import inputs
from scripts.gpu_benchmark.peers import WORKSPACE_BYTES
from scripts.gpu_benchmark.record import OURS, PEER
from scripts.gpu_benchmark.tools import Inputs, Tools, poisoned
from scripts.gpu_benchmark.work import Contender, Cost, Launch, Verdict, Work

PREFILL_ROWS = 1024  # from here on the rows are one request's
POOL_BLOCKS = 1 << 18


@dataclass(frozen=True)
class Shape:
    rows: int
    width: int
    values: str = "normal"  # ragged: lengths drawn up to the width; narrow: values within 1e-4 of each other

    @property
    def case(self) -> str:
        return f"{self.rows} x {self.width >> 10}k" + ("" if self.values == "normal" else f" {self.values}")


def shapes(quick: bool) -> list[Shape]:
    if quick:
        return [Shape(rows, width) for rows in (1, 64) for width in (1 << 15, 1 << 17)]
    found = [Shape(r, n) for r in (1, 2, 8, 32, 64, 128) for n in (1 << 12, 1 << 14, 1 << 15, 1 << 16, 1 << 17)]
    found += [Shape(rows, width) for rows in (1024, 4096) for width in (1 << 12, 1 << 14, 1 << 16)]
    found += [Shape(r, n, "ragged") for r, n in ((8, 1 << 15), (64, 1 << 15), (64, 1 << 17), (4096, 1 << 14))]
    found += [Shape(r, n, "narrow") for r, n in ((1, 1 << 17), (64, 1 << 15), (1024, 1 << 14))]
    return found


def works(tools: Tools) -> Iterator[Work]:
    for shape in shapes(tools.quick):
        yield work_of(shape, tools)


def work_of(shape: Shape, tools: Tools) -> Work:
    """Up to four sets; the rows stay in the L2, where the indexer has just written them."""
    sets = [_inputs(shape) for _ in range(4 if shape.rows * shape.width < 1 << 24 else 1)]
    total = int(sets[0].lengths.long().sum())
    contenders = [Contender(name, PEER, partial(make, tools.peers), check) for name, make in peers_of(shape).items()]
    contenders.append(Contender("ours", OURS, partial(ours, tools), check_ours))
    return Work(shape.case, sets, contenders, Cost(0.0, total * 4.0 + shape.rows * inputs.TOPK * 4.0), poison)


def _inputs(shape: Shape) -> Inputs:
    logits = torch.randn(shape.rows, shape.width) * 3
    if shape.values == "narrow":
        logits = 1.0 + logits * 1e-4
    lengths = torch.full((shape.rows,), shape.width, dtype=torch.int32)
    if shape.values == "ragged":
        lengths = torch.randint(256, shape.width + 1, (shape.rows,)).int()
    requests = 1 if shape.rows >= PREFILL_ROWS else shape.rows
    return Inputs(
        logits=logits,
        lengths=lengths,
        table=inputs.block_tables(POOL_BLOCKS, requests, shape.width // inputs.BLOCK),
        request_ids=torch.arange(shape.rows, dtype=torch.int32) % requests,
    )


def poison(case: Inputs) -> None:
    for name in ("positions", "slots", "counts"):
        if hasattr(case, name):
            getattr(case, name).fill_(-2)


def check(case: Inputs) -> Verdict:
    """The values at the chosen positions are the largest ones, on three rows."""
    rows = case.logits.shape[0]
    return _verdict(sum(not _is_exact(case, row) for row in sorted({0, rows // 3, rows - 1})))


def _verdict(bad: int) -> Verdict:
    return Verdict(f"{bad} rows wrong" if bad else "exact", bad == 0)


def _is_exact(case: Inputs, row: int) -> bool:
    length = int(case.lengths[row])
    count = min(inputs.TOPK, length)
    found = case.positions[row].long()
    found = found[found >= 0]
    if found.numel() != count or int(found.max()) >= length or torch.unique(found).numel() != count:
        return False
    values = case.logits[row, :length].topk(count).values
    return bool(torch.equal(case.logits[row, found].sort().values, values.sort().values))


def check_ours(case: Inputs) -> Verdict:
    """All of the above, and on every row the order, the tail, the slots and the count."""
    counts = case.lengths.clamp(max=inputs.TOPK)
    place = torch.arange(inputs.TOPK)[None]
    inside = place < counts[:, None]
    ascending = (case.positions[:, 1:] > case.positions[:, :-1]) | ~inside[:, 1:]
    tail = torch.where(inside, torch.full_like(case.positions, -1), case.positions)
    table = case.table[case.request_ids.long()]
    right = (
        torch.equal(case.counts, counts)
        and bool(ascending.all())
        and bool((tail == -1).all())
        and torch.equal(case.slots, inputs.slots_of(case.positions, table))
    )
    return check(case) if right else Verdict("order, tail, slots or counts", False)


def ours(tools: Tools, case: Inputs) -> Launch:
    rows = case.logits.shape[0]
    case.positions = poisoned(rows, inputs.TOPK, dtype=torch.int32)
    case.slots = poisoned(rows, inputs.TOPK, dtype=torch.int32)
    case.counts = poisoned(rows, dtype=torch.int32)
    return tools.ours.topk_slots(
        logits=case.logits,
        lengths=case.lengths,
        table=case.table,
        request_ids=case.request_ids,
        num_blocks=POOL_BLOCKS,
        positions=case.positions,
        slot_ids=case.slots,
        counts=case.counts,
    )


# Peers: each maker is given the peers, the input set; their callers fill the output with -1 before


def _positions(case: Inputs) -> Tensor:
    case.positions = torch.full((case.logits.shape[0], inputs.TOPK), -1, dtype=torch.int32)
    return case.positions


def _vllm_whole(name: str, peers: Any, case: Inputs) -> Launch:
    out, workspace = _positions(case), torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8)
    topk = getattr(peers.vllm, name)
    return lambda: topk(case.logits, case.lengths, out, workspace, inputs.TOPK, case.logits.shape[1])


def _vllm_decode_rows(peers: Any, case: Inputs) -> Launch:
    out, (rows, width) = _positions(case), case.logits.shape
    topk = peers.vllm.top_k_per_row_decode
    return lambda: topk(case.logits, 1, case.lengths, out, rows, width, 1, inputs.TOPK)


def _vllm_prefill_rows(peers: Any, case: Inputs) -> Launch:
    out, (rows, width) = _positions(case), case.logits.shape
    topk, starts = peers.vllm.top_k_per_row_prefill, torch.zeros_like(case.lengths)
    return lambda: topk(case.logits, starts, case.lengths, out, rows, width, 1, inputs.TOPK)


def _sgl(peers: Any, case: Inputs) -> Launch:
    out, topk = _positions(case), peers.sgl.fast_topk
    return lambda: topk(case.logits, out, case.lengths, None)


def _torch(peers: Any, case: Inputs) -> Launch:
    del peers

    def run() -> None:
        case.positions = torch.topk(case.logits, inputs.TOPK, dim=1, sorted=False).indices

    return run


def peers_of(shape: Shape) -> dict[str, Callable[[Any, Inputs], Launch]]:
    """The peers that take the shape."""
    found: dict[str, Callable[[Any, Inputs], Launch]] = {"vllm-persistent": partial(_vllm_whole, "persistent_topk")}
    if shape.rows <= 64:
        found["vllm-cooperative"] = partial(_vllm_whole, "cooperative_topk")
    if shape.rows <= 128:
        found["vllm-row-decode"] = _vllm_decode_rows
    else:
        found["vllm-row-prefill"] = _vllm_prefill_rows
    found["sgl-fast"] = _sgl
    if shape.values != "ragged" and shape.rows * shape.width <= 1 << 24:
        found["torch.topk"] = _torch
    return found
