from __future__ import annotations

import numpy as np
import pytest

from fastdeploy_dsa.ops import reference
from tests.kit.c_api import CApi
from tests.kit.cases import Format
from tests.kit.compare import assert_same
from tests.kit.compressed_cases import CompressedRowReadCase, CompressedRowWriteCase
from tests.kit.compressed_checks import check_compressed_row_read
from tests.kit.implementation import Implementation

FORMATS: list[Format] = ["fp8", "bfloat16", "float32"]


@pytest.mark.parametrize("block_rows", [64, 2])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_production_rows(implementation: Implementation, cache_format: Format, block_rows: int) -> None:
    check_compressed_row_read(
        implementation, CompressedRowReadCase(num_rows=150, block_rows=block_rows, cache_format=cache_format)
    )


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(96, 32), (4, 2), (66, 2), (130, 66), (646, 100), (1088, 64)])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_other_dims(implementation: Implementation, cache_format: Format, head_dim: int, rope_dim: int) -> None:
    case = CompressedRowReadCase(head_dim=head_dim, rope_dim=rope_dim, block_rows=3, cache_format=cache_format)
    check_compressed_row_read(implementation, case)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_gaps_between_blocks_are_not_read(c_implementation: CApi, cache_format: Format) -> None:
    check_compressed_row_read(c_implementation, CompressedRowReadCase(cache_format=cache_format, gap_bytes=48))


@pytest.mark.parametrize("num_rows", [0, 1, 3000])
def test_any_number_of_rows_on_any_number_of_threads(implementation: Implementation, num_rows: int) -> None:
    for num_threads in (1, 2, 4):
        check_compressed_row_read(implementation.on_threads(num_threads), CompressedRowReadCase(num_rows=num_rows))


def test_slots_outside_the_cache_give_zeros(implementation: Implementation) -> None:
    arguments = CompressedRowReadCase(num_rows=40).arguments()
    rows = implementation.compressed_row_read(**arguments)
    assert not rows[3::5].any()
    assert rows[0].any()


def test_every_code_and_every_scale_has_its_value(implementation: Implementation) -> None:
    # 64 value numbers a row share a scale: four rows for the 256 codes, one such set for each scale but 255.
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    cache = np.zeros((255, 4 * (64 + 2 * 2 + 8)), np.uint8)
    cache[:, : 4 * 68].reshape(255, 4, 68)[:, :, :64] = codes
    cache[:, 4 * 68 :].reshape(255, 4, 8)[:, :, 0] = np.arange(255)[:, None]
    rows = implementation.compressed_row_read(
        cache=cache, slot_ids=np.arange(4 * 255), head_dim=66, rope_dim=2, block_rows=4
    )
    values = reference.e4m3_decode(codes).astype(np.float64)
    with np.errstate(over="ignore"):
        exact = (values * np.exp2(np.arange(255) - 127.0)[:, None, None]).astype(np.float32)
    np.testing.assert_array_equal(rows[:, :64], exact.reshape(-1, 64))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_what_was_written_is_read_as_what_it_was_rounded_to(
    implementation: Implementation, cache_format: Format
) -> None:
    written = CompressedRowWriteCase(num_tokens=4, cache_format=cache_format).arguments()
    written["slot_mapping"] = np.array([5, 0, 130, 64])
    implementation.compressed_row_write(**written)
    rows = implementation.compressed_row_read(
        cache=written["cache"], slot_ids=written["slot_mapping"], head_dim=512, rope_dim=64, block_rows=64
    )
    rounded = written["rows"] if cache_format == "float32" else reference.bf16_round(written["rows"])
    assert_same(np.ascontiguousarray(rows[:, 448:]), np.ascontiguousarray(rounded[:, 448:]), "rotated numbers")
    amax = np.abs(rounded[:, :448].reshape(4, 7, 64)).max(-1).repeat(64, -1)
    # e4m3 keeps four bits of a number, and down to 2^-9 of the largest 448 at least.
    allowed = 0 if cache_format != "fp8" else np.maximum(np.abs(rounded[:, :448]) / 16, amax * 2.0**-17)
    assert np.all(np.abs(rows[:, :448] - rounded[:, :448]) <= allowed)
