"""What the headers of compressed attention say of CUDA alone: wrong values do no harm, which bits depend on what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.kit.compare import assert_same
from tests.kit.compressed_cases import CompressedMlaCase, KvCompressCase, rejected_requests
from tests.kit.compressed_checks import check_compressed_attention
from tests.kit.implementation import Implementation
from tests.ops.test_compressed_mla import rows_of


@pytest.mark.parametrize("query_format", ["float32", "bfloat16"])
def test_counts_outside_the_lists_are_clamped(gpu_implementation: Implementation, query_format: Any) -> None:
    case = CompressedMlaCase(
        num_tokens=4, window_counts=(40, 40, 0, 0), entry_counts=(0, 70, 70, 0), query_format=query_format
    )
    arguments = case.arguments()
    expected = gpu_implementation.compressed_mla(**arguments)
    wrong = arguments | {
        "window_counts": np.array([41, 2**31 - 1, -1, -(2**31)], np.int32),
        "entry_counts": np.array([-(2**31), 71, 2**31 - 1, -1], np.int32),
    }
    for actual, right, name in zip(gpu_implementation.compressed_mla(**wrong), expected, ("out", "lse"), strict=True):
        assert_same(actual, right, name)


@pytest.mark.parametrize("name", ["positions", "request_ids"])
def test_rows_with_values_out_of_range_are_skipped_alone(gpu_implementation: Implementation, name: str) -> None:
    case = KvCompressCase(spans=((0, 12), (0, 12), (0, 4), (0, 4), (0, 4), (0, 4)), has_padding=False)
    expected, arguments = case.arguments(), case.arguments()
    skipped = np.arange(24, 40)
    values = rejected_requests(len(case.spans)) if name == "request_ids" else [-1, -4, -(2**31), -(2**31) + 3]
    expected["lengths"][skipped] = 0
    arguments[name][skipped] = np.repeat(values, 4)
    gpu_implementation.kv_compress(**expected)
    gpu_implementation.kv_compress(**arguments)
    assert_same(arguments["state_cache"], expected["state_cache"], "state_cache")
    assert_same(arguments["entry_cache"], expected["entry_cache"], "entry_cache")


def attention_cases(**changes: Any) -> Iterator[CompressedMlaCase]:
    """Every kernel: formats, few and many heads."""
    formats: list[tuple[Any, Any]] = [
        ("bfloat16", "fp8"),
        ("float32", "fp8"),
        ("bfloat16", "bfloat16"),
        ("float32", "float32"),
    ]
    for query_format, cache_format in formats:
        for num_heads in (1, 16, 64, 128):
            yield CompressedMlaCase(
                query_format=query_format,
                cache_format=cache_format,
                num_heads=num_heads,
                window_width=128,
                entry_width=300,
                entry_block_rows=64,
                **changes,
            )


WINDOW_COUNTS = (128, 7, 0, 0, 128, 127, 1, 128)
ENTRY_COUNTS = (300, 7, 0, 128, 129, 0, 1, 256)
RAGGED = {"num_tokens": 8, "window_counts": WINDOW_COUNTS, "entry_counts": ENTRY_COUNTS}


@pytest.mark.parametrize("case", list(attention_cases(**RAGGED)), ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_dsa_s72_the_contents_of_other_rows_change_nothing(
    gpu_implementation: Implementation, case: CompressedMlaCase, batch_invariant: bool
) -> None:
    arguments = case.arguments() | {"batch_invariant": batch_invariant}
    out, lse = gpu_implementation.compressed_mla(**arguments)
    order = np.random.default_rng(3).permutation(8)
    for rows in ([5] * 8, [0, 0, 0, 1, 1, 1, 2, 2], order.tolist()):
        other_out, other_lse = gpu_implementation.compressed_mla(**rows_of(arguments, rows))
        assert_same(other_out, out[rows], f"out of rows {rows}")
        assert_same(other_lse, lse[rows], f"lse of rows {rows}")


@pytest.mark.parametrize("case", list(attention_cases(**RAGGED)), ids=str)
def test_dsa_s73_a_batch_invariant_row_has_the_same_bits_in_any_batch(
    gpu_implementation: Implementation, case: CompressedMlaCase
) -> None:
    arguments = case.arguments() | {"batch_invariant": True}
    out, lse = gpu_implementation.compressed_mla(**arguments)
    many = [i % 8 for i in range(300)]
    for rows in ([0], [1], [2], [4, 3], [7, 0, 5], list(range(7)), many):
        part_out, part_lse = gpu_implementation.compressed_mla(**rows_of(arguments, rows))
        assert_same(part_out, out[rows], f"out of {len(rows)} rows, first {rows[:4]}")
        assert_same(part_lse, lse[rows], f"lse of {len(rows)} rows, first {rows[:4]}")


@pytest.mark.parametrize("case", list(attention_cases(num_tokens=3, invalid_every=4)), ids=str)
def test_skipped_ids_leave_no_trace_beyond_rounding(
    gpu_implementation: Implementation, case: CompressedMlaCase
) -> None:
    arguments = case.arguments()
    changed = dict(arguments)
    for part in ("window", "entry"):
        num_slots = len(arguments[f"{part}_cache"]) * arguments[f"{part}_block_rows"]
        packed = np.stack([ids[(ids >= 0) & (ids < num_slots)] for ids in arguments[f"{part}_slots"]])
        changed[f"{part}_slots"] = np.ascontiguousarray(np.pad(packed, ((0, 0), (0, 200)), constant_values=-1))
    out, lse = gpu_implementation.compressed_mla(**changed)
    check_compressed_attention(gpu_implementation, changed, out, lse)
