"""What the headers say of CUDA alone: wrong values do no harm, streams, graphs, and which bits may depend on what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kit.c_api import CApi
from tests.kit.c_cuda import CCuda
from tests.kit.cases import (
    BlockCopyCase,
    Format,
    IndexerCase,
    IndexKeyWriteCase,
    IndexQueryQuantCase,
    LayerWriteCase,
    MlaCacheWriteCase,
    SparseMlaCase,
    TopkCase,
)
from tests.kit.checks import assert_same_selection, check_attention
from tests.kit.compare import assert_same
from tests.kit.compressed_cases import (
    CompressedMlaCase,
    CompressedRowReadCase,
    CompressedRowWriteCase,
    InverseRopeCase,
    KvCompressCase,
)
from tests.kit.implementation import Implementation
from tests.kit.poison import invalid_ids
from tests.ops.test_indexer_logits import visible
from tests.ops.test_sparse_mla import rows_of

FORMATS: list[Format] = ["fp8", "bfloat16", "float32"]
CASES: dict[str, Any] = {
    "block_copy": BlockCopyCase(),
    "compressed_mla": CompressedMlaCase(query_format="bfloat16", window_counts=(40, 0, 5), entry_counts=(70, 0, 5)),
    "compressed_row_read": CompressedRowReadCase(),
    "compressed_row_write": CompressedRowWriteCase(),
    "index_key_write": IndexKeyWriteCase(),
    "index_query_quant": IndexQueryQuantCase(),
    "indexer_logits": IndexerCase(),
    "inverse_rope": InverseRopeCase(),
    "kv_compress": KvCompressCase(),
    "layer_write": LayerWriteCase(),
    "mla_cache_write": MlaCacheWriteCase(),
    "sparse_mla": SparseMlaCase(query_format="bfloat16", counts=(70, 0, 5)),
    "topk_slots": TopkCase(),
    "index_select": IndexerCase(),
}


def arguments_of(op: str) -> dict[str, Any]:
    """Fresh arguments."""
    case = CASES[op]
    arguments: dict[str, Any] = case.selection_arguments(topk=70) if op == "index_select" else case.arguments()
    return arguments


def results(implementation: Implementation, op: str) -> dict[str, NDArray[Any]]:
    """All that a call makes and changes."""
    arguments = arguments_of(op)
    made = getattr(implementation, op)(**arguments)
    arrays = [] if made is None else list(made) if isinstance(made, tuple) else [made]
    if op == "indexer_logits":
        arrays = [visible(arrays[0], arguments["lengths"])]
    targets = ("cache", "latent_cache", "index_cache", "state_cache", "entry_cache", "dst", "x")
    changed = [arguments[name] for name in targets if name in arguments]
    return {f"result {i}": array for i, array in enumerate([*arrays, *changed])}


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("way", ["uses_default_stream", "uses_graph"])
def test_a_call_on_the_default_stream_or_out_of_a_graph_gives_the_same_bits(
    c_gpu_implementation: CApi, op: str, way: str
) -> None:
    assert isinstance(c_gpu_implementation, CCuda)
    direct = results(c_gpu_implementation, op)
    for name, array in results(replace(c_gpu_implementation, **{way: True}), op).items():
        assert_same(array, direct[name], name)


@pytest.mark.parametrize("op", CASES)
def test_fifty_calls_give_the_same_bits(gpu_implementation: Implementation, op: str) -> None:
    first = results(gpu_implementation, op)
    for _ in range(49):
        for name, array in results(gpu_implementation, op).items():
            assert_same(array, first[name], name)


def too_long(capacity: int) -> list[int]:
    """Lengths beyond the columns or the block table."""
    return [capacity + 1, capacity + 1000, 2**31 - 1]


@pytest.mark.parametrize("cache_format", FORMATS)
def test_scores_of_a_length_that_is_too_large_stop_at_the_columns_and_at_the_block_table(
    gpu_implementation: Implementation, cache_format: Format
) -> None:
    arguments = IndexerCase(lengths=(192, 192, 192, 100), cache_format=cache_format).arguments()
    arguments["block_table"] = np.ascontiguousarray(arguments["block_table"][:, :3])
    for width in (192, 150, 300):
        arguments["logits_width"] = width
        bounded = arguments | {"lengths": np.array([min(192, width)] * 3 + [100], np.int32)}
        expected = gpu_implementation.indexer_logits(**bounded)
        longer = arguments | {"lengths": np.array([*too_long(min(192, width)), 100], np.int32)}
        actual = gpu_implementation.indexer_logits(**longer)
        assert_same(visible(actual, bounded["lengths"]), visible(expected, bounded["lengths"]), f"width {width}")


def test_a_selection_of_a_length_that_is_too_large_is_that_of_the_largest(gpu_implementation: Implementation) -> None:
    arguments = TopkCase(lengths=(192, 192, 192), topk=50, width=200, block_size=64).arguments()
    arguments["block_table"] = np.ascontiguousarray(arguments["block_table"][:, :3])
    expected = gpu_implementation.topk_slots(**arguments)
    longer = arguments | {"lengths": np.array(too_long(192), np.int32)}
    assert_same_selection(gpu_implementation.topk_slots(**longer), expected)
    narrow = arguments | {"logits": np.ascontiguousarray(arguments["logits"][:, :100])}
    expected = gpu_implementation.topk_slots(**narrow | {"lengths": np.full(3, 100, np.int32)})
    assert_same_selection(gpu_implementation.topk_slots(**narrow), expected)


def test_index_select_stops_at_max_length(gpu_implementation: Implementation) -> None:
    arguments = IndexerCase(lengths=(192, 192, 192)).selection_arguments(topk=50)
    arguments["block_table"] = np.ascontiguousarray(arguments["block_table"][:, :3])
    for max_length in (192, 130, 1000):
        lengths = np.full(3, min(192, max_length), np.int32)
        bounded = arguments | {"max_length": max_length, "lengths": lengths}
        longer = bounded | {"lengths": np.array(too_long(192), np.int32)}
        expected = gpu_implementation.index_select(**bounded)
        assert_same_selection(gpu_implementation.index_select(**longer), expected)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_a_wrong_request_id_gives_nan_scores_and_no_slots(
    gpu_implementation: Implementation, cache_format: Format
) -> None:
    arguments = IndexerCase(lengths=(200,) * 5, index_n_heads=8, cache_format=cache_format).arguments()
    arguments["request_ids"][:4] = invalid_ids(len(arguments["block_table"]), np.int32)
    logits = gpu_implementation.indexer_logits(**arguments)
    assert np.all(np.isnan(logits[:4, :200]))
    assert not np.isnan(logits[4, :200]).any()
    cache = arguments["index_cache"]
    paging = {name: arguments[name] for name in ("lengths", "request_ids", "block_table")}
    for topk in (50, 200, 300):
        selection = gpu_implementation.topk_slots(
            logits=logits, topk=topk, num_blocks=cache.shape[0], block_size=cache.shape[1], **paging
        )
        assert np.all(selection.slot_ids[:4] == -1)
        assert np.all(selection.positions[:4, : min(topk, 200)] == np.arange(min(topk, 200)))
        assert np.all(selection.counts == min(topk, 200))
        assert np.all(selection.slot_ids[4, : min(topk, 200)] >= 0)


def test_counts_outside_the_selection_are_clamped(gpu_implementation: Implementation) -> None:
    for query_format in ("float32", "bfloat16"):
        case = SparseMlaCase(num_tokens=4, counts=(70, 70, 0, 0), query_format=query_format)
        arguments = case.arguments()
        expected = gpu_implementation.sparse_mla(**arguments)
        wrong = arguments | {"counts": np.array([71, 2**31 - 1, -1, -(2**31)], np.int32)}
        for actual, right, name in zip(gpu_implementation.sparse_mla(**wrong), expected, ("out", "lse"), strict=True):
            assert_same(actual, right, f"{name}, {query_format}")


@pytest.mark.parametrize("side", ["src", "dst"])
def test_a_pair_outside_its_arena_is_skipped_alone(gpu_implementation: Implementation, side: str) -> None:
    arguments = BlockCopyCase(num_copies=9).arguments()
    ids = arguments[f"{side}_block_ids"]
    wrong = [1, 3, 6, 8]
    expected = arguments["dst"].copy()
    right = [i for i in range(9) if i not in wrong]
    expected[arguments["dst_block_ids"][right]] = arguments["src"][arguments["src_block_ids"][right]]
    ids[wrong] = invalid_ids(len(arguments[side]), np.int64)
    gpu_implementation.block_copy(**arguments)
    assert_same(arguments["dst"], expected, "dst")


def attention_cases(**changes: Any) -> Iterator[SparseMlaCase]:
    """Every kernel: formats, few and many heads."""
    for query_format, cache_format in (("bfloat16", "fp8"), ("float32", "fp8"), ("bfloat16", "bfloat16")):
        for num_heads in (1, 16, 64, 128):
            yield SparseMlaCase(query_format=query_format, cache_format=cache_format, num_heads=num_heads, **changes)  # type: ignore[arg-type]


COUNTS = (400, 7, 0, 128, 129, 399, 1, 256, 300, 200, 64, 65)


@pytest.mark.parametrize("case", list(attention_cases(num_tokens=12, topk=400, counts=COUNTS)), ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_dsa_s72_the_contents_of_other_rows_change_nothing(
    gpu_implementation: Implementation, case: SparseMlaCase, batch_invariant: bool
) -> None:
    arguments = case.arguments() | {"batch_invariant": batch_invariant}
    out, lse = gpu_implementation.sparse_mla(**arguments)
    order = np.random.default_rng(3).permutation(12)
    for rows in ([5] * 12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], order.tolist()):
        other_out, other_lse = gpu_implementation.sparse_mla(**rows_of(arguments, rows))
        assert_same(other_out, out[rows], f"out of rows {rows}")
        assert_same(other_lse, lse[rows], f"lse of rows {rows}")


@pytest.mark.parametrize("case", list(attention_cases(num_tokens=12, topk=400, counts=COUNTS)), ids=str)
def test_dsa_s73_a_batch_invariant_row_has_the_same_bits_in_any_batch(
    gpu_implementation: Implementation, case: SparseMlaCase
) -> None:
    arguments = case.arguments() | {"batch_invariant": True}
    out, lse = gpu_implementation.sparse_mla(**arguments)
    many = [i % 12 for i in range(300)]
    for rows in ([0], [1], [3], [4, 2], [11, 0, 5], [6, 7, 8, 9], list(range(11)), many):
        part_out, part_lse = gpu_implementation.sparse_mla(**rows_of(arguments, rows))
        assert_same(part_out, out[rows], f"out of {len(rows)} rows, first {rows[:4]}")
        assert_same(part_lse, lse[rows], f"lse of {len(rows)} rows, first {rows[:4]}")


@pytest.mark.parametrize("case", list(attention_cases(num_tokens=3, topk=300, invalid_every=4)), ids=str)
def test_skipped_ids_leave_no_trace_beyond_rounding(gpu_implementation: Implementation, case: SparseMlaCase) -> None:
    arguments = case.arguments()
    num_slots = arguments["latent_cache"].shape[0] * arguments["latent_cache"].shape[2]
    packed = np.stack([ids[(ids >= 0) & (ids < num_slots)] for ids in arguments["slot_ids"]])
    for slot_ids in (packed, np.ascontiguousarray(np.pad(packed, ((0, 0), (0, 300)), constant_values=-1))):
        changed = arguments | {"slot_ids": slot_ids}
        out, lse = gpu_implementation.sparse_mla(**changed)
        check_attention(changed, out, lse, rounds_weights=gpu_implementation.rounds_weights(arguments))


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_rows_of_other_requests_change_no_score_of_fp8(gpu_implementation: Implementation, num_rows: int) -> None:
    case = IndexerCase(lengths=(1000, 999, 998, 500, 501, 70, 0, 1), requests=(0, 0, 0, 1, 1, 2, 3, 4))
    arguments = case.arguments()
    together = visible(gpu_implementation.indexer_logits(**arguments), arguments["lengths"])
    for first in range(0, 8, num_rows):
        rows = list(range(first, min(first + num_rows, 8)))
        names = ("query", "folded_weights", "request_ids", "lengths")
        part = arguments | {name: np.ascontiguousarray(arguments[name][rows]) for name in names}
        assert_same(
            visible(gpu_implementation.indexer_logits(**part), part["lengths"]), together[rows], f"rows {rows}"
        )
