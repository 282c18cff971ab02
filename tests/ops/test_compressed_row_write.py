from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference.compressed import compressed_block_fields
from tests.kit.c_api import CApi
from tests.kit.cases import Format
from tests.kit.compressed_cases import CompressedRowWriteCase, row_cache
from tests.kit.compressed_checks import check_compressed_row_write
from tests.kit.implementation import Implementation

FORMATS: list[Format] = ["fp8", "bfloat16", "float32"]


def written_block(implementation: Implementation, values: Any, *, block_rows: int, slot: int) -> Any:
    """The bytes of the only block of an fp8 cache after one row of 512 numbers was written."""
    cache = row_cache(1, block_rows, 512, 64, "fp8")
    implementation.compressed_row_write(
        rows=np.asarray(values, np.float32)[None],
        cache=cache,
        slot_mapping=np.array([slot]),
        rope_dim=64,
        block_rows=block_rows,
    )
    return cache[0]


@pytest.mark.parametrize("input_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_rows", [64, 2])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_production_rows_have_the_bytes_of_the_definition(
    implementation: Implementation, cache_format: str, block_rows: int, input_format: str
) -> None:
    case = CompressedRowWriteCase(
        num_tokens=150, block_rows=block_rows, cache_format=cache_format, input_format=input_format
    )
    check_compressed_row_write(implementation, case)


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(96, 32), (4, 2), (66, 2), (130, 66), (646, 100), (1088, 64)])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_other_dims_have_the_bytes_of_the_definition(
    implementation: Implementation, cache_format: str, head_dim: int, rope_dim: int
) -> None:
    case = CompressedRowWriteCase(head_dim=head_dim, rope_dim=rope_dim, block_rows=3, cache_format=cache_format)
    check_compressed_row_write(implementation, case)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_strided_rows_are_read_as_their_contiguous_copies(implementation: Implementation, cache_format: str) -> None:
    case = CompressedRowWriteCase(cache_format=cache_format, input_format="bfloat16", has_row_strides=True)
    check_compressed_row_write(implementation, case)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_gaps_between_blocks_stay_as_they_are(c_implementation: CApi, cache_format: str) -> None:
    check_compressed_row_write(c_implementation, CompressedRowWriteCase(cache_format=cache_format, gap_bytes=48))


@pytest.mark.parametrize("num_tokens", [0, 1, 1000])
def test_any_number_of_rows(implementation: Implementation, num_tokens: int) -> None:
    check_compressed_row_write(implementation, CompressedRowWriteCase(num_tokens=num_tokens))


def test_bytes_do_not_depend_on_threads(implementation: Implementation) -> None:
    for num_threads in (1, 2, 4):
        check_compressed_row_write(
            implementation.on_threads(num_threads), CompressedRowWriteCase(num_tokens=3000, input_format="bfloat16")
        )


def test_v4_v09_scales_lie_at_the_tail_of_the_block(implementation: Implementation) -> None:
    # Check 7: n 64, row 5: data 2880, rotated part 3328, scales 36904; n 2, row 1: data 576, scales 1160.
    row = np.zeros(512)
    row[0], row[448] = 1.0, 1.0
    for block_rows, slot, data, scales, page in ((64, 5, 2880, 36904, 37440), (2, 1, 576, 1160, 1728)):
        block = written_block(implementation, row, block_rows=block_rows, slot=slot)
        assert len(block) == page
        assert block[data] == reference.e4m3_encode(256.0)  # the scale of an amax of 1 is 2^-8
        assert block[data + 448 : data + 450].view(np.uint16)[0] == reference.bf16_encode(1.0)
        assert block[scales : scales + 8].tolist() == [119, *[105] * 6, 0]


@pytest.mark.parametrize(
    ("largest", "byte"), [(0.0, 105), (1e-4, 105), (1.0, 119), (448.0, 127), (450.0, 128), (3.3e38, 247)]
)
def test_scales_are_powers_of_two_from_a_floor_on(implementation: Implementation, largest: float, byte: int) -> None:
    row = np.zeros(512)
    row[70] = -largest
    block = written_block(implementation, row, block_rows=2, slot=0)
    assert block[2 * 576 + 1] == byte
    assert block[2 * 576] == 105


def test_numbers_that_are_not_finite_read_back_as_what_they_are(implementation: Implementation) -> None:
    row = np.ones(512, np.float32)
    row[3], row[70], row[140], row[460], row[461] = np.nan, np.inf, -np.inf, np.nan, -np.inf
    cache = written_block(implementation, row, block_rows=2, slot=1)[None]
    data, scales = compressed_block_fields(cache, 2, 512, 64)
    assert scales[0, 1].tolist() == [254, 254, 254, 119, 119, 119, 119, 0]
    assert data[0, 1, 3] & 0x7F == 0x7F
    read = reference.compressed_row_read(cache=cache, slot_ids=np.array([1]), head_dim=512, rope_dim=64, block_rows=2)[
        0
    ]
    special = [3, 70, 140, 460, 461]
    np.testing.assert_array_equal(read[special], row[special])
    finite = np.delete(np.arange(512), special)
    assert np.all(np.isfinite(read[finite]))
    np.testing.assert_array_equal(read[192:448], row[192:448])
