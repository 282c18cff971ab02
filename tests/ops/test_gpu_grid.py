"""The shapes of production and their edges, on a GPU: too slow for the scalar definition on a CPU, too many for CI."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.ops import reference
from tests.kit.c_api import CApi
from tests.kit.cases import Format, IndexerCase, Keys, Scores, SparseMlaCase, TopkCase
from tests.kit.checks import (
    assert_same_selection,
    check_attention,
    check_index_select,
    check_indexer_logits,
    check_sparse_mla,
    check_topk_slots,
)
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation

FORMATS: list[Format] = ["fp8", "bfloat16", "float32"]
HEADS = [1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128]


def production(**changes: Any) -> SparseMlaCase:
    """bfloat16 queries over the fp8 cache of DeepSeek-V3.2."""
    return SparseMlaCase(**{"query_format": "bfloat16", "cache_format": "fp8", **changes})


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_attention_of_any_number_of_heads(gpu_implementation: Implementation, num_heads: int, num_tokens: int) -> None:
    check_sparse_mla(gpu_implementation, production(num_heads=num_heads, num_tokens=num_tokens, topk=300, seed=1))


@pytest.mark.parametrize("topk", [1, 2, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 500, 512, 1000, 1024, 2048, 4096])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_attention_of_any_width(gpu_implementation: Implementation, topk: int, num_heads: int) -> None:
    check_sparse_mla(gpu_implementation, production(num_heads=num_heads, topk=topk, num_tokens=2, seed=topk))


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 7, 8, 16, 31, 32, 64, 65, 128, 131, 132, 133, 256, 400])
@pytest.mark.parametrize("num_heads", [16, 64, 128])
def test_attention_of_any_number_of_rows(gpu_implementation: Implementation, num_tokens: int, num_heads: int) -> None:
    rng = np.random.default_rng(num_tokens)
    counts = tuple(int(n) for n in np.where(rng.random(num_tokens) < 0.2, rng.choice([0, 1, 3]), rng.integers(4, 97)))
    case = production(num_heads=num_heads, num_tokens=num_tokens, topk=96, counts=counts, num_slots=1000)
    check_sparse_mla(gpu_implementation, case)


@pytest.mark.parametrize("count", [0, 1, 5, 63, 64, 65, 127, 128, 129, 511, 1000, 1023, 1024, 1025, 2047, 2048])
@pytest.mark.parametrize("num_heads", [8, 16, 32, 64, 128])
def test_attention_of_ragged_counts(gpu_implementation: Implementation, count: int, num_heads: int) -> None:
    case = production(num_heads=num_heads, topk=2048, num_tokens=4, counts=(count, 2048, count // 2, count))
    check_sparse_mla(gpu_implementation, case)


@pytest.mark.parametrize("invalid_every", [0, 2, 3, 64, 65])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_attention_skips_ids_outside_the_cache(
    gpu_implementation: Implementation, invalid_every: int, num_heads: int
) -> None:
    case = production(num_heads=num_heads, topk=1000, invalid_every=invalid_every, counts=(1000, 999, 3))
    check_sparse_mla(gpu_implementation, case)


@pytest.mark.parametrize("logit_size", [0.0, 1e-3, 0.1, 5.0, 20.0])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_attention_that_is_flat_or_peaked(
    gpu_implementation: Implementation, logit_size: float, num_heads: int
) -> None:
    check_sparse_mla(gpu_implementation, production(num_heads=num_heads, topk=700, logit_size=logit_size))


@pytest.mark.parametrize("first", [0, 64, 500])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_rows_that_are_empty_in_parts(gpu_implementation: Implementation, first: int, num_heads: int) -> None:
    """All ids of a stretch lie outside the cache, so that a part of a row has no maximum."""
    arguments = production(num_heads=num_heads, topk=2048, num_tokens=3, invalid_every=0).arguments()
    arguments["slot_ids"][0, first : first + 1100] = -1
    arguments["slot_ids"][1, :first] = 2**31 - 1
    arguments["slot_ids"][2, first + 1 :] = -(2**31)
    out, lse = gpu_implementation.sparse_mla(**arguments)
    check_attention(arguments, out, lse, rounds_weights=gpu_implementation.rounds_weights(arguments))


@pytest.mark.parametrize("scale_format", ["ue8m0", "plain"])
@pytest.mark.parametrize("block_size", [1, 16, 64, 100])
def test_attention_over_blocks_with_gaps(c_gpu_implementation: CApi, block_size: int, scale_format: Any) -> None:
    for gap_bytes in (0, 16, 48, 4):
        case = production(
            num_heads=64, topk=200, block_size=block_size, gap_bytes=gap_bytes, scale_format=scale_format
        )
        check_sparse_mla(c_gpu_implementation, case)


def test_attention_over_a_long_context(gpu_implementation: Implementation) -> None:
    case = production(num_tokens=2, num_heads=128, topk=2048, num_slots=40_000, counts=(2048, 2047))
    check_sparse_mla(gpu_implementation, case)


def draft_rows(num_drafts: int, contexts: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Rows of a step that verifies drafts: each row of a request sees one token more."""
    return {
        "lengths": tuple(max(context - num_drafts + 1 + i, 0) for context in contexts for i in range(num_drafts)),
        "requests": tuple(request for request in range(len(contexts)) for _ in range(num_drafts)),
    }


@pytest.mark.parametrize("num_drafts", range(1, 9))
@pytest.mark.parametrize("index_n_heads", [32, 64])
def test_scores_of_draft_rows(gpu_implementation: Implementation, num_drafts: int, index_n_heads: int) -> None:
    rows = draft_rows(num_drafts, (700, 64, 65, 1, 300, 0, 129))
    check_indexer_logits(gpu_implementation, IndexerCase(index_n_heads=index_n_heads, **rows))


@pytest.mark.parametrize("index_n_heads", HEADS)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_scores_of_any_number_of_heads(
    gpu_implementation: Implementation, index_n_heads: int, cache_format: Format
) -> None:
    case = IndexerCase(
        lengths=(513, 64, 0, 1, 255, 200), index_n_heads=index_n_heads, cache_format=cache_format, seed=3
    )
    check_indexer_logits(gpu_implementation, case)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("index_n_heads", [32, 64])
def test_scores_of_a_prompt(gpu_implementation: Implementation, num_rows: int, index_n_heads: int) -> None:
    """Rows of one request beside rows of others."""
    lengths = (*range(300, 300 + num_rows), 64, 640, 0, 7)
    requests = (*[0] * num_rows, 1, 2, 3, 4)
    check_indexer_logits(
        gpu_implementation, IndexerCase(lengths=lengths, requests=requests, index_n_heads=index_n_heads)
    )


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("length", [8192, 65536, 131072])
def test_scores_of_long_contexts(gpu_implementation: Implementation, cache_format: Format, length: int) -> None:
    lengths = (length, length - 1, 0, 1) if length < 100_000 else (length,)
    heads = 64 if cache_format == "fp8" else 8
    requests = (0, 0, 1, 2)[: len(lengths)]
    case = IndexerCase(lengths=lengths, requests=requests, index_n_heads=heads, cache_format=cache_format)
    check_indexer_logits(gpu_implementation, case)


@pytest.mark.parametrize("keys", ["random", "tied", "close"])
@pytest.mark.parametrize("index_n_heads", [32, 64])
def test_long_selections(gpu_implementation: Implementation, keys: Keys, index_n_heads: int) -> None:
    case = IndexerCase(lengths=(20_000, 2048, 2049, 5000), keys=keys, index_n_heads=index_n_heads)
    check_index_select(gpu_implementation, case, topk=2048)


@pytest.mark.parametrize("topk", [1, 63, 64, 512, 1024, 2048, 4096])
def test_tied_selections_of_any_width_are_those_of_the_definition(
    gpu_implementation: Implementation, topk: int
) -> None:
    case = IndexerCase(lengths=(9000, topk, topk + 1, 4097), keys="tied", index_n_heads=16)
    selection = check_index_select(gpu_implementation, case, topk=topk)
    assert_same_selection(selection, reference.index_select(**case.selection_arguments(topk=topk)))


def test_a_selection_over_the_longest_context(gpu_implementation: Implementation) -> None:
    check_index_select(gpu_implementation, IndexerCase(lengths=(131_072,), index_n_heads=32), topk=2048)


@pytest.mark.parametrize("num_drafts", range(1, 9))
def test_selections_of_draft_rows(gpu_implementation: Implementation, num_drafts: int) -> None:
    check_index_select(gpu_implementation, IndexerCase(**draft_rows(num_drafts, (3000, 2048, 700, 0))), topk=2048)


def test_fifty_large_calls_give_the_same_bits(gpu_implementation: Implementation) -> None:
    attention = production(num_tokens=4, num_heads=128, topk=2048, counts=(2048, 2000, 1, 600)).arguments()
    long = TopkCase(lengths=(131_072, 100_000, 3000), topk=2048, scores="plateau").arguments()
    index = IndexerCase(lengths=(20_000, 9000), keys="tied").selection_arguments(topk=2048)
    out, lse = gpu_implementation.sparse_mla(**attention)
    selections = gpu_implementation.topk_slots(**long), gpu_implementation.index_select(**index)
    for _ in range(49):
        again_out, again_lse = gpu_implementation.sparse_mla(**attention)
        assert_same(again_out, out, "out")
        assert_same(again_lse, lse, "lse")
        assert_same_selection(gpu_implementation.topk_slots(**long), selections[0])
        assert_same_selection(gpu_implementation.index_select(**index), selections[1])


@pytest.mark.parametrize("scores", ["random", "plateau", "close", "special"])
@pytest.mark.parametrize("topk", [1, 2, 31, 64, 100, 511, 512, 1000, 1024, 2047, 2048, 3000, 4096])
def test_topk_of_rows_of_every_length(gpu_implementation: Implementation, scores: Scores, topk: int) -> None:
    lengths = (131_072, 131_071, 65_536, 40_000, 20_000, 8192, 8193, topk, topk + 1, 2 * topk, 0, 1, -1, 4096)
    check_topk_slots(gpu_implementation, TopkCase(lengths=lengths, topk=topk, scores=scores, seed=topk))


@pytest.mark.parametrize("num_tokens", [1, 8, 64, 300])
@pytest.mark.parametrize("width", [2049, 5000, 17_000, 33_000])
def test_topk_of_many_rows(gpu_implementation: Implementation, num_tokens: int, width: int) -> None:
    rng = np.random.default_rng(width)
    lengths = (*(int(n) for n in rng.integers(0, width + 1, num_tokens - 1)), width)
    check_topk_slots(gpu_implementation, TopkCase(lengths=lengths, topk=2048, scores="close", seed=num_tokens))


@pytest.mark.parametrize("has_row_stride", [False, True])
def test_topk_of_scores_that_differ_in_their_last_bit(
    gpu_implementation: Implementation, has_row_stride: bool
) -> None:
    for topk in (1, 777, 2048):
        case = TopkCase(lengths=(100_000, 3000), topk=topk, has_row_stride=has_row_stride)
        arguments = case.arguments()
        base = np.float32(1.5).view(np.int32) + np.random.default_rng(5).permutation(100_000).astype(np.int32)
        arguments["logits"][0, :100_000] = base.view(np.float32)
        expected = reference.topk_slots(**arguments)
        assert_same_selection(gpu_implementation.topk_slots(**arguments), expected)
