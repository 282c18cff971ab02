"""Section chain: everything between the projections in one layer's decode step, one graph.

The peers: two cache writes, DeepGEMM's logits, a top-k with its fill and slot map, FlashMLA. Ours: one launch for the
writes and the quantisation of the index queries (which the peers' figure does not contain), the scores, the top-k with
the slots, the attention.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from scripts.gpu_benchmark import inputs, writes
from scripts.gpu_benchmark.decode import BOUND
from scripts.gpu_benchmark.index_decode import BOUND as SCORE_BOUND
from scripts.gpu_benchmark.peers import WORKSPACE_BYTES
from scripts.gpu_benchmark.record import OURS, PART, PEER
from scripts.gpu_benchmark.tools import Inputs, Tools, bfloat16, index_queries, poisoned
from scripts.gpu_benchmark.work import Contender, Cost, Launch, MakeLaunch, Verdict, Work

MAX_PAGE_TABLE = 1 << 24  # entries of SGLang's table of single tokens, over all sets


@dataclass(frozen=True)
class Shape:
    requests: int
    context: int
    heads: int

    @property
    def case(self) -> str:
        return f"b{self.requests} {self.context >> 10}k h{self.heads}"

    @property
    def cold_bytes(self) -> int:
        return self.requests * (self.context * inputs.INDEX_ROW + inputs.TOPK * inputs.LATENT_ROW)


def shapes(quick: bool) -> list[Shape]:
    contexts = (1 << 15,) if quick else (1 << 12, 1 << 15, 1 << 17)
    return [Shape(b, context, heads) for b in (1, 8, 64) for context in contexts for heads in (128, 16)]


def works(tools: Tools) -> Iterator[Work]:
    for shape in shapes(tools.quick):
        yield work_of(shape, tools)


def work_of(shape: Shape, tools: Tools) -> Work:
    tokens = 1 << (22 if tools.quick else 23)
    count = tools.timer.set_count(shape.cold_bytes, most=min(48, tokens // (shape.requests * shape.context)))
    blocks = shape.context // inputs.BLOCK
    tables = inputs.block_tables(tokens // inputs.BLOCK, count * shape.requests, blocks)
    sets = [_inputs(shape, table, tokens, tools) for table in tables.view(count, shape.requests, blocks)]
    vllm, sgl = (tools.peers.flashmla_decode(build) for build in ("vllm", "sgl"))  # with one plan for all sets
    contenders = [Contender("vllm", PEER, partial(vllm_step, tools, vllm), check)]
    if shape.requests * shape.context * count <= MAX_PAGE_TABLE:
        contenders.append(Contender("sgl", PEER, partial(sgl_step, tools, sgl), check))
    contenders.append(Contender("ours", OURS, partial(ours_step, tools), check))
    contenders.append(Contender("ours, index_select", OURS, partial(ours_selecting_step, tools), check))
    if not tools.quick:
        for steps, name in enumerate(("writes", "scores", "top-k"), start=1):
            contenders.append(Contender(f"ours to {name}", PART, partial(ours_first_steps, tools, steps), None))
    costs = _costs(shape)
    return Work(
        shape.case,
        sets,
        contenders,
        Cost(sum(cost.flops for cost in costs), sum(cost.num_bytes for cost in costs)),
        poison,
        sum(tools.timer.floor(cost)[0] for cost in costs),
    )


def _costs(shape: Shape) -> tuple[Cost, Cost]:
    """Of the scores and of the attention, which depend on each other."""
    keys, heads = shape.requests * shape.context, shape.heads
    scores = Cost(2.0 * keys * inputs.INDEX_HEADS * inputs.INDEX_DIM, keys * inputs.INDEX_ROW, "fp8")
    width = inputs.QUERY + inputs.NOPE
    return scores, Cost(
        2.0 * shape.requests * heads * inputs.TOPK * width,
        shape.requests * (inputs.TOPK * inputs.LATENT_ROW + heads * width * 2),
    )


def _inputs(shape: Shape, table: torch.Tensor, tokens: int, tools: Tools) -> Inputs:
    """The step's token stands at the end of its context."""
    requests = shape.requests
    return Inputs(
        latent_pool=tools.pool(inputs.latent_pool, tokens),
        index_pool=tools.pool(inputs.index_pool, tokens),
        attention_query=bfloat16(requests, 1, shape.heads, inputs.QUERY),
        latent=bfloat16(requests, inputs.NOPE),
        rope=bfloat16(requests, inputs.ROPE),
        key=bfloat16(requests, inputs.INDEX_DIM),
        query=bfloat16(requests, inputs.INDEX_HEADS, inputs.INDEX_DIM),
        weights=torch.randn(requests, inputs.INDEX_HEADS),
        quantized=index_queries(requests, 1),
        folded=torch.randn(requests, inputs.INDEX_HEADS),
        table=table,
        slots=table[:, -1].long() * inputs.BLOCK + inputs.BLOCK - 1,
        lengths=torch.full((requests, 1), shape.context, dtype=torch.int32),
        request_ids=torch.arange(requests, dtype=torch.int32),
        context=shape.context,
        positions=poisoned(requests, inputs.TOPK, dtype=torch.int32),
        selected=poisoned(requests, 1, inputs.TOPK, dtype=torch.int32),
        counts=poisoned(requests, dtype=torch.int32),
    )


def poison(case: Inputs) -> None:
    case.positions.fill_(-2)
    case.selected.fill_(-2)
    case.counts.fill_(-2)
    case.out = None
    for name in ("ours_out", "ours_logits"):
        if hasattr(case, name):
            getattr(case, name).fill_(float("nan"))


def _peer_head(tools: Tools, case: Inputs) -> Launch:
    """Writes and logits, which both chains of peers share."""
    layer = writes.peer_layer(tools, case)
    logits = tools.peers.paged_logits(
        query=case.quantized,
        weights=case.folded,
        pool=case.index_pool,
        table=case.table,
        lengths=case.lengths,
        plan=tools.peers.schedule(case.lengths),
        max_length=case.context,
    )

    def run() -> None:
        layer()
        case.logits = logits()

    return run


def _peer_attention(decode: MakeLaunch, case: Inputs) -> Launch:
    attention = Inputs(query=case.attention_query, pool=case.latent_pool, slots=case.selected)
    launch = decode(attention)

    def run() -> None:
        launch()
        case.out = attention.out

    return run


def vllm_step(tools: Tools, decode: MakeLaunch, case: Inputs) -> Launch:
    head, attention = _peer_head(tools, case), _peer_attention(decode, case)
    slot_map = importlib.import_module("scripts.gpu_benchmark.triton_kernels").slot_map
    topk, workspace = tools.peers.vllm.cooperative_topk, torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8)
    lengths = case.lengths.view(-1)

    def run() -> None:
        head()
        case.positions.fill_(-1)
        topk(case.logits, lengths, case.positions, workspace, inputs.TOPK, case.context)
        slot_map(case.positions, case.table, case.selected)
        attention()

    return run


def sgl_step(tools: Tools, decode: MakeLaunch, case: Inputs) -> Launch:
    head, attention = _peer_head(tools, case), _peer_attention(decode, case)
    topk, requests = tools.peers.sgl.fast_topk_transform_fused, case.table.shape[0]
    starts, lengths = torch.arange(requests + 1, dtype=torch.int32), case.lengths.view(-1)
    pages = torch.stack([inputs.slots_of_blocks(row) for row in case.table]).int()

    def run() -> None:
        head()
        topk(case.logits, lengths, case.selected.view(requests, inputs.TOPK), pages, starts, None)
        attention()

    return run


def _ours_attention(tools: Tools, case: Inputs) -> Launch:
    heads = case.attention_query.shape[2]
    case.ours_out = poisoned(case.table.shape[0], 1, heads, inputs.NOPE)
    return tools.ours.sparse_mla(
        query=case.attention_query,
        pool=case.latent_pool,
        slots=case.selected,
        counts=case.counts,
        out=case.ours_out,
        lse=torch.empty(case.table.shape[0], 1, heads, dtype=torch.float32),
    )


def _ours_steps(tools: Tools, case: Inputs) -> list[Launch]:
    case.ours_logits = poisoned(case.table.shape[0], case.context, dtype=torch.float32)
    lengths = case.lengths.view(-1)
    return [
        writes.ours_layer(tools, case),
        tools.ours.indexer_logits(
            query=case.quantized,
            weights=case.folded,
            pool=case.index_pool,
            table=case.table,
            request_ids=case.request_ids,
            lengths=lengths,
            logits=case.ours_logits,
        ),
        tools.ours.topk_slots(
            logits=case.ours_logits,
            lengths=lengths,
            table=case.table,
            request_ids=case.request_ids,
            num_blocks=case.index_pool.shape[0],
            positions=case.positions,
            slot_ids=case.selected,
            counts=case.counts,
        ),
        _ours_attention(tools, case),
    ]


def ours_step(tools: Tools, case: Inputs) -> Launch:
    steps = _ours_steps(tools, case)

    def run() -> None:
        for step in steps:
            step()
        case.logits, case.out = case.ours_logits, case.ours_out

    return run


def ours_first_steps(tools: Tools, count: int, case: Inputs) -> Launch:
    """Differences of these are what a step costs in its place."""
    steps = _ours_steps(tools, case)[:count]

    def run() -> None:
        for step in steps:
            step()

    return run


def ours_selecting_step(tools: Tools, case: Inputs) -> Launch:
    """Scores and top-k in one call."""
    steps = [
        writes.ours_layer(tools, case),
        tools.ours.index_select(
            query=case.quantized,
            weights=case.folded,
            pool=case.index_pool,
            table=case.table,
            request_ids=case.request_ids,
            lengths=case.lengths.view(-1),
            max_length=case.context,
            positions=case.positions,
            slot_ids=case.selected,
            counts=case.counts,
        ),
        _ours_attention(tools, case),
    ]

    def run() -> None:
        for step in steps:
            step()
        case.logits, case.out = None, case.ours_out

    return run


def check(case: Inputs) -> Verdict:
    """The first request's scores, selection and attention, each from what the stage before it left.

    Without scores of its own the selection is compared with the float64 ones: nearly equal scores may change places.
    """
    query, weights = case.quantized.view(-1, inputs.INDEX_HEADS, inputs.INDEX_DIM)[0], case.folded[0]
    keys = inputs.index_keys(case.index_pool, case.table[0])
    wanted = inputs.index_scores(query.float().double(), weights.double(), keys)
    place = torch.full((case.latent_pool.shape[0] * inputs.BLOCK,), -1, dtype=torch.int32)
    place[inputs.slots_of_blocks(case.table[0])] = torch.arange(case.context, dtype=torch.int32)
    selected = case.selected[0, 0].long()
    if int(selected.min()) < 0 or int(selected.max()) >= place.numel():
        return Verdict("a slot outside the cache", False)
    positions = place[selected].long()
    if int(positions.min()) < 0 or torch.unique(positions).numel() != inputs.TOPK:
        return Verdict("a slot of another request, or twice", False)
    if case.logits is None:
        found, best = wanted[positions].sort().values, wanted.topk(inputs.TOPK).values.sort().values
        selection = Verdict.of(inputs.relative_error(found, best), SCORE_BOUND)
    else:
        scores = case.logits[0, : case.context]
        exact = torch.equal(scores[positions].sort().values, scores.topk(inputs.TOPK).values.sort().values)
        error = Verdict.of(inputs.relative_error(scores, wanted), SCORE_BOUND)
        selection = error if exact else Verdict("selection not exact", False)
    rows = inputs.latent_rows(case.latent_pool, selected)
    attention = inputs.relative_error(case.out[0, 0], inputs.attention(case.attention_query[0, 0].double(), rows))
    return Verdict(f"{selection.text} {attention:.1e}", selection.right and attention <= BOUND)
