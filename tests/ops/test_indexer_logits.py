from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from tests.kit.c_api import CApi
from tests.kit.cases import Format, IndexerCase
from tests.kit.checks import check_indexer_logits
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation, Refused
from tests.kit.poison import invalid_ids

FORMATS: list[Format] = ["fp8", "bfloat16", "float32"]
PER_ROW = ("query", "folded_weights", "request_ids", "lengths")


def visible(logits: NDArray[Any], lengths: NDArray[np.int32]) -> NDArray[Any]:
    """Scores with zeros behind each row's length."""
    return np.where(np.arange(logits.shape[1]) < lengths[:, None], logits, np.float32(0))


def rows_of(arguments: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The arguments with some rows only."""
    return arguments | {name: np.ascontiguousarray(arguments[name][rows]) for name in PER_ROW}


@pytest.mark.parametrize("cache_format", FORMATS)
def test_production_dims_and_ragged_lengths(implementation: Implementation, cache_format: Format) -> None:
    check_indexer_logits(
        implementation,
        IndexerCase(lengths=(1000, 1, 0, 64, 2049, 63, 65, 128), cache_format=cache_format),
    )


@pytest.mark.parametrize("index_n_heads", [1, 2, 3, 8, 17, 32, 64, 128])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_any_number_of_heads(implementation: Implementation, cache_format: Format, index_n_heads: int) -> None:
    check_indexer_logits(
        implementation, IndexerCase(index_n_heads=index_n_heads, cache_format=cache_format, seed=index_n_heads)
    )


@pytest.mark.parametrize("index_head_dim", [1, 5, 16, 33, 64, 100, 127])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_odd_dims_and_blocks(implementation: Implementation, cache_format: Format, index_head_dim: int) -> None:
    check_indexer_logits(
        implementation,
        IndexerCase(
            lengths=(50, 3, 0, 12, 13),
            index_n_heads=5,
            index_head_dim=index_head_dim,
            block_size=12,
            cache_format=cache_format,
        ),
    )


@pytest.mark.parametrize("cache_format", ["bfloat16", "float32"])
def test_unquantised_keys_may_be_wider_than_128_and_blocks_of_any_size(
    implementation: Implementation, cache_format: Format
) -> None:
    check_indexer_logits(
        implementation, IndexerCase(index_head_dim=200, index_n_heads=7, block_size=1, cache_format=cache_format)
    )


@pytest.mark.parametrize("block_size", [4, 8, 32, 100])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_block_sizes(implementation: Implementation, cache_format: Format, block_size: int) -> None:
    check_indexer_logits(
        implementation, IndexerCase(index_n_heads=4, block_size=block_size, cache_format=cache_format)
    )


def test_dsa_t14_plain_scales_are_read_as_they_are_stored(implementation: Implementation) -> None:
    check_indexer_logits(implementation, IndexerCase(scale_format="plain"))


@pytest.mark.parametrize("keys", ["tied", "close"])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_equal_and_close_scores(implementation: Implementation, cache_format: Format, keys: Any) -> None:
    check_indexer_logits(implementation, IndexerCase(keys=keys, cache_format=cache_format))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_exactly_representable_sums_are_exact(implementation: Implementation, cache_format: Format) -> None:
    arguments = IndexerCase(keys="tied", cache_format=cache_format).arguments()
    logits = implementation.indexer_logits(**arguments)
    expected = reference.indexer_logits(**arguments).astype(np.float32)
    lengths = arguments["lengths"]
    # Adding +0 turns -0 into +0: the sign of a zero sum is free.
    assert_same(visible(logits, lengths) + np.float32(0), visible(expected, lengths) + np.float32(0), "logits")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_dsa_t13_gaps_between_blocks_are_not_read(c_implementation: CApi, cache_format: Format) -> None:
    check_indexer_logits(c_implementation, IndexerCase(cache_format=cache_format, gap_bytes=48))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_a_block_outside_the_cache_scores_nan(implementation: Implementation, cache_format: Format) -> None:
    arguments = IndexerCase(lengths=(200, 200, 200, 200), index_n_heads=8, cache_format=cache_format).arguments()
    for row, invalid in enumerate(invalid_ids(arguments["index_cache"].shape[0], np.int32)):
        arguments["block_table"][row, 1] = invalid
    logits = implementation.indexer_logits(**arguments)
    is_nan = np.isnan(logits[:, :200])
    assert np.all(is_nan[:, 64:128])
    assert not is_nan[:, :64].any()
    assert not is_nan[:, 128:].any()


@pytest.mark.parametrize("cache_format", FORMATS)
def test_an_empty_batch_gives_no_rows(implementation: Implementation, cache_format: Format) -> None:
    arguments = IndexerCase(lengths=(), cache_format=cache_format).arguments()
    assert implementation.indexer_logits(**arguments).shape == (0, arguments["logits_width"])


@pytest.mark.parametrize("cache_format", FORMATS)
def test_dsa_t11_rows_of_length_zero_or_less_score_nothing(c_implementation: CApi, cache_format: Format) -> None:
    check_indexer_logits(c_implementation, IndexerCase(lengths=(0, -1, -(2**31), 70), cache_format=cache_format))
    check_indexer_logits(c_implementation, IndexerCase(lengths=(0, -5), cache_format=cache_format))


def test_a_length_beyond_the_logits_or_the_table_is_refused(c_cpu_implementation: CApi) -> None:
    for extra in (1, 10_000):
        arguments = IndexerCase(lengths=(100,), block_size=16).arguments()
        arguments["lengths"][0] = arguments["logits_width"] + extra
        with pytest.raises(Refused):
            c_cpu_implementation.indexer_logits(**arguments)
    arguments = IndexerCase(lengths=(100,), block_size=16).arguments()
    arguments["block_table"] = np.ascontiguousarray(arguments["block_table"][:, :3])
    with pytest.raises(Refused):
        c_cpu_implementation.indexer_logits(**arguments)


def test_documented_hand_example(implementation: Implementation) -> None:
    # Check 8 of the DSA data flow: D 4, Hi 2, keys [2,1,0,0], [-1,3,0,0], [2,1,0,0], [0,-2,0,0].
    keys = np.array([[2, 1, 0, 0], [-1, 3, 0, 0], [2, 1, 0, 0], [0, -2, 0, 0]], np.float32)
    query, folded = reference.index_query_quant(
        query=np.array([[[1, 0, 0, 0], [0, 1, 0, 0]]], np.float32),
        weights=np.array([[1, -0.5]], np.float32),
        cache_format="float32",
    )
    logits = implementation.indexer_logits(
        query=query,
        folded_weights=folded,
        index_cache=keys[None],
        block_table=np.zeros((1, 1), np.int32),
        request_ids=np.zeros(1, np.int32),
        lengths=np.array([4], np.int32),
        logits_width=4,
    )
    assert np.allclose(logits, [[0.530330, -0.530330, 0.530330, 0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_dsa_t05_all_negative_weights_give_negative_scores(
    implementation: Implementation, cache_format: Format
) -> None:
    arguments = IndexerCase(lengths=(300,), cache_format=cache_format).arguments()
    arguments["folded_weights"] = -np.abs(arguments["folded_weights"])
    scores = implementation.indexer_logits(**arguments)[0, :300]
    assert np.all(scores <= 0)
    assert (scores < 0).sum() == (reference.indexer_logits(**arguments)[0, :300] < 0).sum()


@pytest.mark.parametrize("cache_format", FORMATS)
def test_long_contexts_and_many_rows(implementation: Implementation, cache_format: Format) -> None:
    few_heads: dict[str, Any] = {"index_n_heads": 3, "index_head_dim": 16, "cache_format": cache_format}
    check_indexer_logits(implementation, IndexerCase(lengths=(20_000, 8192, 8193, 12_345), **few_heads))
    many = tuple(int(n) for n in np.random.default_rng(6).integers(0, 90, 300))
    check_indexer_logits(
        implementation, IndexerCase(lengths=many, requests=tuple(i // 7 for i in range(300)), **few_heads)
    )


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_scores_do_not_depend_on_threads(
    implementation: Implementation, cache_format: Format, num_threads: int
) -> None:
    case = IndexerCase(lengths=(700, 1, 0, 64, 513, 63), index_n_heads=16, cache_format=cache_format)
    arguments = case.arguments()
    actual = implementation.on_threads(num_threads).indexer_logits(**arguments)
    lengths = arguments["lengths"]
    assert_same(visible(actual, lengths), visible(implementation.indexer_logits(**arguments), lengths), "logits")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_scores_of_a_row_do_not_depend_on_the_rows_beside_it(
    implementation: Implementation, cache_format: Format
) -> None:
    # One request in prefill (rows 0-20), verify rows of a second, decode rows of others.
    lengths = (*range(180, 201), 97, 98, 99, 100, 333, 0, 5)
    requests = (*[0] * 21, 1, 1, 1, 1, 2, 3, 4)
    case = IndexerCase(lengths=lengths, requests=requests, index_n_heads=16, cache_format=cache_format)
    arguments = case.arguments()
    together = visible(implementation.indexer_logits(**arguments), arguments["lengths"])
    for rows in ([0], [3, 4], [21, 22, 23, 24], [25], [20, 2, 27], list(range(1, 18)), list(range(9))):
        part = rows_of(arguments, rows)
        actual = visible(implementation.indexer_logits(**part), part["lengths"])
        assert_same(actual, together[rows], f"rows {rows}")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_scores_of_a_position_do_not_depend_on_the_length(
    implementation: Implementation, cache_format: Format
) -> None:
    case = IndexerCase(lengths=(300,), index_n_heads=16, cache_format=cache_format)
    whole = implementation.indexer_logits(**case.arguments())
    for length in (1, 7, 63, 64, 65, 127, 299):
        arguments = case.arguments()
        arguments["lengths"][0] = length
        assert_same(implementation.indexer_logits(**arguments)[:, :length], whole[:, :length], f"length {length}")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_equal_keys_have_equal_scores_wherever_they_lie(implementation: Implementation, cache_format: Format) -> None:
    arguments = replace(IndexerCase(lengths=(200,), cache_format=cache_format), seed=3).arguments()
    cache, blocks = arguments["index_cache"], arguments["block_table"][0]
    key = np.random.default_rng(8).standard_normal((1, 128)).astype(np.float32)
    copies = np.array([0, 1, 15, 16, 63, 64, 70, 127, 128, 191, 192, 199])
    slots = blocks[copies // 64].astype(np.int64) * 64 + copies % 64
    reference.index_key_write(key=np.repeat(key, len(copies), 0), cache=cache, slot_mapping=slots)
    scores = implementation.indexer_logits(**arguments)[0, copies]
    assert_same(scores, np.full(len(copies), scores[0]), "scores of equal keys")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_fifty_repetitions_are_identical(implementation: Implementation, cache_format: Format) -> None:
    arguments = IndexerCase(index_n_heads=8, cache_format=cache_format).arguments()
    lengths = arguments["lengths"]
    first = visible(implementation.indexer_logits(**arguments), lengths)
    for _ in range(49):
        assert_same(visible(implementation.indexer_logits(**arguments), lengths), first, "logits")
