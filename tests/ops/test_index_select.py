from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference import IndexSelection
from tests.kit.c_api import CApi
from tests.kit.cases import Format, IndexerCase
from tests.kit.checks import assert_same_selection, check_index_select
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation

FORMATS: list[Format] = ["fp8", "bfloat16", "float32"]
PER_ROW = ("query", "folded_weights", "request_ids", "lengths")
K = 8


def rows_of(arguments: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The arguments with some rows only."""
    return arguments | {name: np.ascontiguousarray(arguments[name][rows]) for name in PER_ROW}


def some_rows(selection: IndexSelection, rows: list[int]) -> IndexSelection:
    """The selection of some rows."""
    return IndexSelection(*(array[rows] for array in selection))


@pytest.mark.parametrize("topk", [1, 16, 100, 512])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_selection_is_that_of_the_two_ops(implementation: Implementation, cache_format: Format, topk: int) -> None:
    case = IndexerCase(lengths=(1000, 1, 0, 64, 600, 63, 65, 128), cache_format=cache_format)
    check_index_select(implementation, case, topk=topk)


def test_production_top_2048(implementation: Implementation) -> None:
    check_index_select(implementation, IndexerCase(lengths=(5000, 2048, 2049, 100)), topk=2048)


@pytest.mark.parametrize("max_logits_bytes", [1, 4, 4096, 20_000, 1 << 20])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_dsa_t25_the_budget_of_scores_never_changes_the_rows(
    implementation: Implementation, cache_format: Format, max_logits_bytes: int
) -> None:
    case = IndexerCase(
        lengths=(*range(290, 300), 5, 0, 700),
        requests=(*[0] * 10, 1, 2, 3),
        index_n_heads=8,
        cache_format=cache_format,
    )
    check_index_select(implementation, case, topk=32, max_logits_bytes=max_logits_bytes)


def test_more_rows_than_are_scored_at_a_time(implementation: Implementation) -> None:
    lengths = tuple(int(n) for n in np.random.default_rng(6).integers(0, 90, 700))
    case = IndexerCase(lengths=lengths, requests=tuple(i // 7 for i in range(700)), index_n_heads=2, index_head_dim=16)
    check_index_select(implementation, case, topk=K)


def test_dsa_t25_scratch_memory_stays_near_the_budget_unless_one_row_exceeds_it(c_implementation: CApi) -> None:
    case = IndexerCase(lengths=(4000,) * 256, requests=(0,) * 256, index_n_heads=1, index_head_dim=8)
    sizes = {}
    for rows in (1, 8, 64):
        arguments = case.selection_arguments(topk=16, max_logits_bytes=rows * 4000 * 4)
        sizes[rows] = workspace_bytes(c_implementation, arguments)
    row_bytes = 4000 * 4
    # What one more row may cost: its scores with their padding, nothing of the size of the batch.
    assert (sizes[64] - sizes[8]) / 56 <= 1.1 * row_bytes
    assert sizes[1] <= sizes[8] <= sizes[64] < 256 * row_bytes


def workspace_bytes(c_implementation: CApi, arguments: dict[str, Any]) -> int:
    """What index_select asks for."""
    library = c_implementation.library
    query, cache = arguments["query"], arguments["index_cache"]
    struct = library.struct("dsa_index_select_params")
    params = struct(
        max_logits_bytes=arguments["max_logits_bytes"],
        max_length=arguments["max_length"],
        block_stride_bytes=cache.strides[0],
        num_blocks=cache.shape[0],
        num_tokens=len(query),
        num_requests=arguments["block_table"].shape[0],
        max_blocks=arguments["block_table"].shape[1],
        block_size=cache.shape[1],
        index_n_heads=query.shape[1],
        index_head_dim=query.shape[2],
        topk=arguments["topk"],
        cache_format=c_implementation.format_of(cache),
    )
    return c_implementation.workspace_bytes("index_select", params)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_gaps_between_blocks_are_not_read(c_implementation: CApi, cache_format: Format) -> None:
    check_index_select(c_implementation, IndexerCase(cache_format=cache_format, gap_bytes=32), topk=K)


def test_dsa_t14_plain_scales(implementation: Implementation) -> None:
    check_index_select(implementation, IndexerCase(scale_format="plain"), topk=K)


@pytest.mark.parametrize("topk", [1, 64, 200, 4096])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_planted_ties_go_to_the_smaller_position(
    implementation: Implementation, cache_format: Format, topk: int
) -> None:
    case = IndexerCase(lengths=(1500, 300, 64), keys="tied", index_n_heads=16, cache_format=cache_format)
    selection = check_index_select(implementation, case, topk=topk)
    # All sums are exact, so the float64 definition has the same ties.
    assert_same_selection(selection, reference.index_select(**case.selection_arguments(topk=topk)))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_close_scores(implementation: Implementation, cache_format: Format) -> None:
    check_index_select(
        implementation, IndexerCase(lengths=(1500, 300), keys="close", cache_format=cache_format), topk=64
    )


@pytest.mark.parametrize("cache_format", FORMATS)
def test_short_rows_are_never_scored(implementation: Implementation, cache_format: Format) -> None:
    arguments = IndexerCase(lengths=(8, 3, 0, 7), cache_format=cache_format).selection_arguments(topk=K)
    arguments["query"][...] = 0xFF if arguments["query"].dtype == np.uint8 else 0
    arguments["folded_weights"][...] = np.nan
    selection = implementation.index_select(**arguments)
    assert selection.counts.tolist() == [8, 3, 0, 7]
    assert selection.positions[1].tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    assert selection.positions[2].tolist() == [-1] * K


def test_dsa_t11_padding_rows_are_all_minus_one(implementation: Implementation) -> None:
    check_index_select(implementation, IndexerCase(lengths=(0, 100, -1, -(2**31), 30)), topk=K)
    check_index_select(implementation, IndexerCase(lengths=(0, 0)), topk=K)


def test_an_empty_batch_gives_empty_results(implementation: Implementation) -> None:
    check_index_select(implementation, IndexerCase(lengths=()), topk=K)


def test_a_block_outside_the_cache_ranks_last(implementation: Implementation) -> None:
    arguments = IndexerCase(lengths=(200,)).selection_arguments(topk=100)
    arguments["block_table"][0, 1] = -1
    selection = implementation.index_select(**arguments)
    assert not np.isin(selection.positions, np.arange(64, 128)).any()
    arguments["topk"] = 150  # 136 keys have scores: the rest are the first of those that have none
    selection = implementation.index_select(**arguments)
    assert np.isin(np.arange(64, 64 + 14), selection.positions).all()
    assert np.all(selection.slot_ids[0, 64 : 64 + 14] == -1)
    assert selection.counts[0] == 150


@pytest.mark.parametrize("cache_format", FORMATS)
def test_dsa_s71_rows_do_not_depend_on_steps_neighbours_or_threads(
    implementation: Implementation, cache_format: Format
) -> None:
    # Check 15: a prompt of 5 K tokens beside others, in one step and in steps of other sizes.
    block_size, length = 8, 5 * K
    lengths = (*range(1, length + 1), 97, 98, 99, 100, 333, 0, 8, 9)
    requests = (*[0] * length, 1, 1, 1, 1, 2, 3, 4, 5)
    case = IndexerCase(
        lengths=lengths, requests=requests, index_n_heads=8, block_size=block_size, cache_format=cache_format
    )
    arguments = case.selection_arguments(topk=K)
    together = implementation.index_select(**arguments)
    for step in (1, 7, block_size - 1, block_size, block_size + 1, length):
        for first in range(0, length, step):
            rows = list(range(first, min(first + step, length)))
            actual = implementation.index_select(**rows_of(arguments, rows))
            assert_same_selection(actual, some_rows(together, rows))
    for rows in ([length, length + 1, length + 2, length + 3], [length + 4], [length + 5, 3], [5, length + 4, 39, 11]):
        assert_same_selection(implementation.index_select(**rows_of(arguments, rows)), some_rows(together, rows))
    for num_threads in (1, 2, 4):
        assert_same_selection(implementation.on_threads(num_threads).index_select(**arguments), together)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_fifty_repetitions_over_planted_ties_are_identical(
    implementation: Implementation, cache_format: Format
) -> None:
    case = IndexerCase(lengths=(700, 90, 300), keys="tied", index_n_heads=4, cache_format=cache_format)
    arguments = case.selection_arguments(topk=64)
    first = implementation.index_select(**arguments)
    for _ in range(49):
        assert_same_selection(implementation.index_select(**arguments), first)


def test_a_wider_bound_of_lengths_changes_nothing(implementation: Implementation) -> None:
    arguments = IndexerCase().selection_arguments(topk=K)
    narrow = implementation.index_select(**arguments)
    wide = implementation.index_select(**arguments | {"max_length": 5 * arguments["max_length"]})
    assert_same_selection(wide, narrow)


def with_filled_up_blocks(implementation: Implementation, arguments: dict[str, Any]) -> dict[str, Any]:
    """A cache with gaps as the implementation takes it: as it is, or with the gaps as parts of blocks of bytes."""
    cache = arguments["index_cache"]
    if implementation.takes_block_gaps:
        return arguments
    blocks = np.lib.stride_tricks.as_strided(cache, (len(cache), cache.strides[0]), (cache.strides[0], 1))
    return arguments | {"index_cache": blocks, "block_size": cache.shape[1]}


@pytest.mark.parametrize("lengths", [(130, 1, 0, 64, 65, 200), (300,)])
def test_v4_s34_fp8_blocks_of_8640_bytes_hold_8448_bytes_of_keys(
    implementation: Implementation, lengths: tuple[int, ...]
) -> None:
    case, filled_up = IndexerCase(lengths=lengths), IndexerCase(lengths=lengths, gap_bytes=8640 - 8448)
    expected = implementation.index_select(**case.selection_arguments(topk=50))
    arguments = with_filled_up_blocks(implementation, filled_up.selection_arguments(topk=50))
    assert_same_selection(implementation.index_select(**arguments), expected)
    scores = implementation.indexer_logits(**case.arguments())
    padded = implementation.indexer_logits(**with_filled_up_blocks(implementation, filled_up.arguments()))
    visible = np.arange(scores.shape[1]) < np.array(lengths)[:, None]
    assert_same(padded, scores, "scores", mask=visible)
