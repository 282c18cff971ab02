"""Section writes: what one layer writes, and the quantisation of its index queries.

The peers launch a kernel for each cache; one figure is both, one after the other. Ours is one launch, which also
quantises the index queries: the peers' figure does not contain that.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from scripts.gpu_benchmark import inputs
from scripts.gpu_benchmark.record import OURS, PEER
from scripts.gpu_benchmark.tools import Inputs, Tools, bfloat16
from scripts.gpu_benchmark.work import Contender, Cost, Launch, Verdict, Work

POOL_TOKENS = 1 << 21
ROUNDING = 4e-2  # of e4m3 under its scale
QUERY_BYTES = inputs.INDEX_HEADS * (inputs.INDEX_DIM * 3 + 8)  # bfloat16 in, e4m3 out, weights in and out


def works(tools: Tools) -> Iterator[Work]:
    for tokens in (1, 8, 64, 128) if tools.quick else (1, 8, 64, 128, 1024, 4096, 16384):
        yield from works_of(tokens, tools)


def works_of(tokens: int, tools: Tools) -> Iterator[Work]:
    latent, index = inputs.LATENT_WRITE * tokens, inputs.INDEX_WRITE * tokens
    sets = [
        _inputs(tokens, tools) for _ in range(tools.timer.set_count(latent + index, most=64 if tokens < 1024 else 8))
    ]
    yield Work(
        f"layer T{tokens}",
        sets,
        [
            Contender("vllm, two launches", PEER, partial(peer_layer, tools), check_writes),
            Contender(
                "ours", OURS, partial(ours_layer, tools), check_layer, Cost(0.0, latent + index + QUERY_BYTES * tokens)
            ),
        ],
        Cost(0.0, latent + index),
        poison,
    )
    yield Work(
        f"latent T{tokens}",
        sets,
        [
            Contender("vllm-concat", PEER, partial(peer_latent, tools), check_latent),
            Contender("ours", OURS, partial(ours_latent, tools), check_latent),
        ],
        Cost(0.0, latent),
        poison,
    )
    yield Work(
        f"index key T{tokens}",
        sets,
        [
            Contender("vllm-index-key", PEER, partial(peer_index, tools), check_index),
            Contender("ours", OURS, partial(ours_index, tools), check_index),
        ],
        Cost(0.0, index),
        poison,
    )
    yield Work(
        f"index query T{tokens}",
        sets,
        [Contender("ours", OURS, partial(ours_query, tools), check_query)],
        Cost(0.0, QUERY_BYTES * tokens),
        poison,
    )


def _inputs(tokens: int, tools: Tools) -> Inputs:
    """Decode tokens lie anywhere; those of a prefill follow each other."""
    latent, index = tools.pool(inputs.latent_pool, POOL_TOKENS), tools.pool(inputs.index_pool, POOL_TOKENS)
    if tokens <= 256:
        slots = torch.randperm(POOL_TOKENS)[:tokens].contiguous()
    else:
        slots = torch.arange(tokens) + int(torch.randint((POOL_TOKENS - tokens) // inputs.BLOCK, (1,))) * inputs.BLOCK
    return Inputs(
        latent_pool=latent,
        index_pool=index,
        slots=slots,
        latent=bfloat16(tokens, inputs.NOPE),
        rope=bfloat16(tokens, inputs.ROPE),
        key=bfloat16(tokens, inputs.INDEX_DIM),
        query=bfloat16(tokens, inputs.INDEX_HEADS, inputs.INDEX_DIM),
        weights=torch.randn(tokens, inputs.INDEX_HEADS),
        quantized=torch.zeros(tokens, inputs.INDEX_HEADS, inputs.INDEX_DIM, dtype=torch.uint8).view(inputs.FP8),
        folded=torch.zeros(tokens, inputs.INDEX_HEADS),
    )


def poison(case: Inputs) -> None:
    """NaN in the rows to be written, and in the whole index blocks, whose scales stand apart."""
    case.latent_pool.view(-1, inputs.LATENT_ROW)[case.slots] = 0x7F
    case.index_pool.view(-1, inputs.BLOCK * inputs.INDEX_ROW)[case.slots // inputs.BLOCK] = 0x7F
    case.quantized.view(torch.uint8).fill_(0x7F)
    case.folded.fill_(float("nan"))


def peer_latent(tools: Tools, case: Inputs) -> Launch:
    return tools.peers.write_latent(latent=case.latent, rope=case.rope, pool=case.latent_pool, slots=case.slots)


def peer_index(tools: Tools, case: Inputs) -> Launch:
    return tools.peers.write_index_key(key=case.key, pool=case.index_pool, slots=case.slots)


def peer_layer(tools: Tools, case: Inputs) -> Launch:
    latent, index = peer_latent(tools, case), peer_index(tools, case)

    def run() -> None:
        latent()
        index()

    return run


def ours_latent(tools: Tools, case: Inputs) -> Launch:
    fields = tools.ours.mla_cache_write_fields(
        latent=case.latent, rope=case.rope, pool=case.latent_pool, slots=case.slots
    )
    return tools.ours.launch("mla_cache_write", fields)


def ours_index(tools: Tools, case: Inputs) -> Launch:
    fields = tools.ours.index_key_write_fields(key=case.key, pool=case.index_pool, slots=case.slots)
    return tools.ours.launch("index_key_write", fields)


def ours_query(tools: Tools, case: Inputs) -> Launch:
    fields = tools.ours.index_query_quant_fields(
        query=case.query, weights=case.weights, quantized=case.quantized, folded=case.folded
    )
    return tools.ours.launch("index_query_quant", fields)


def ours_layer(tools: Tools, case: Inputs) -> Launch:
    """All three in one launch."""
    return tools.ours.launch(
        "layer_write",
        {
            "latent": tools.ours.mla_cache_write_fields(
                latent=case.latent, rope=case.rope, pool=case.latent_pool, slots=case.slots
            ),
            "index_key": tools.ours.index_key_write_fields(key=case.key, pool=case.index_pool, slots=case.slots),
            "index_query": tools.ours.index_query_quant_fields(
                query=case.query, weights=case.weights, quantized=case.quantized, folded=case.folded
            ),
        },
    )


def _all(*verdicts: Verdict) -> Verdict:
    return Verdict(" ".join(verdict.text for verdict in verdicts), all(verdict.right for verdict in verdicts))


def check_latent(case: Inputs) -> Verdict:
    found = inputs.latent_rows(case.latent_pool, case.slots[:4096])
    error = inputs.relative_error(found[:, : inputs.NOPE], case.latent[:4096])
    if not torch.equal(found[:, inputs.NOPE :].bfloat16(), case.rope[:4096]):
        return Verdict(f"{error:.1e}, rope differs", False)
    return Verdict.of(error, ROUNDING)


def written_index_keys(pool: Tensor, slots: Tensor) -> Tensor:
    """[n, INDEX_DIM] float64: the keys of single slots."""
    block = pool.view(-1, inputs.BLOCK * inputs.INDEX_ROW)[slots // inputs.BLOCK]
    offset = (slots % inputs.BLOCK)[:, None]
    numbers = block.gather(1, offset * inputs.INDEX_DIM + torch.arange(inputs.INDEX_DIM)[None])
    scales = block.gather(1, inputs.BLOCK * inputs.INDEX_DIM + offset * 4 + torch.arange(4)[None])
    return numbers.view(inputs.FP8).float().double() * scales.contiguous().view(torch.float32).double()


def check_index(case: Inputs) -> Verdict:
    found = written_index_keys(case.index_pool, case.slots[:4096])
    return Verdict.of(inputs.relative_error(found, case.key[:4096]), ROUNDING)


def check_query(case: Inputs) -> Verdict:
    """Numbers times the scale that the folded weights carry give the queries back."""
    fold = (inputs.INDEX_DIM * inputs.INDEX_HEADS) ** -0.5
    scales = case.folded[:1024].double() / (case.weights[:1024].double() * fold)
    found = case.quantized[:1024].float().double() * scales[..., None]
    return Verdict.of(inputs.relative_error(found, case.query[:1024]), ROUNDING)


def check_writes(case: Inputs) -> Verdict:
    return _all(check_latent(case), check_index(case))


def check_layer(case: Inputs) -> Verdict:
    return _all(check_latent(case), check_index(case), check_query(case))
