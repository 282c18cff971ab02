from __future__ import annotations

import numpy as np
import pytest

from tests.kit.c_api import CApi
from tests.kit.cases import IndexKeyWriteCase
from tests.kit.cases.common import index_cache
from tests.kit.checks import check_index_key_write
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation
from tests.kit.poison import POISON_BYTE

FORMATS = ["fp8", "bfloat16", "float32"]


@pytest.mark.parametrize("input_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_production_keys_have_the_bytes_of_the_definition(
    implementation: Implementation, cache_format: str, input_format: str
) -> None:
    check_index_key_write(
        implementation, IndexKeyWriteCase(num_tokens=150, cache_format=cache_format, input_format=input_format)
    )


@pytest.mark.parametrize("index_head_dim", [1, 3, 17, 64, 100, 127])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_odd_dims_have_the_bytes_of_the_definition(
    implementation: Implementation, cache_format: str, index_head_dim: int
) -> None:
    check_index_key_write(
        implementation, IndexKeyWriteCase(index_head_dim=index_head_dim, block_size=4, cache_format=cache_format)
    )


@pytest.mark.parametrize("cache_format", ["bfloat16", "float32"])
def test_unquantised_keys_may_be_wider_than_128_and_blocks_of_any_size(
    implementation: Implementation, cache_format: str
) -> None:
    check_index_key_write(
        implementation, IndexKeyWriteCase(index_head_dim=200, block_size=5, cache_format=cache_format)
    )


@pytest.mark.parametrize("input_format", ["float32", "bfloat16"])
def test_plain_scales_are_the_wanted_scales(implementation: Implementation, input_format: str) -> None:
    check_index_key_write(implementation, IndexKeyWriteCase(scale_format="plain", input_format=input_format))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_strided_inputs_are_read_as_their_contiguous_copies(implementation: Implementation, cache_format: str) -> None:
    check_index_key_write(implementation, IndexKeyWriteCase(cache_format=cache_format, has_row_strides=True))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_gaps_between_blocks_stay_as_they_are(c_implementation: CApi, cache_format: str) -> None:
    check_index_key_write(c_implementation, IndexKeyWriteCase(cache_format=cache_format, gap_bytes=20))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_an_empty_batch_changes_nothing(implementation: Implementation, cache_format: str) -> None:
    check_index_key_write(implementation, IndexKeyWriteCase(num_tokens=0, cache_format=cache_format))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_slots_outside_the_cache_are_skipped(implementation: Implementation, cache_format: str) -> None:
    arguments = IndexKeyWriteCase(num_tokens=8, cache_format=cache_format).arguments()
    num_slots = arguments["cache"].shape[0] * arguments["cache"].shape[1]
    limits = np.iinfo(np.int64)
    arguments["slot_mapping"][:] = [-1, limits.min, limits.max, num_slots, num_slots + 1, -(2**31), -(2**32), 2**32]
    implementation.index_key_write(**arguments)
    assert np.all(arguments["cache"].copy().view(np.uint8) == POISON_BYTE)


@pytest.mark.parametrize(
    ("amax", "scale"), [(0.0, 2.0**-22), (5e-5, 2.0**-22), (0.5, 2.0**-9), (1.0, 2.0**-8), (448.0, 1.0), (450.0, 2.0)]
)
def test_scale_of_a_key_is_the_next_power_of_two(implementation: Implementation, amax: float, scale: float) -> None:
    cache = index_cache(1, 4, 2, "fp8")
    implementation.index_key_write(
        key=np.array([[0, -amax]], np.float32), cache=cache, slot_mapping=np.array([2]), scale_format="ue8m0"
    )
    assert cache.reshape(-1)[8:].view(np.float32)[2] == scale


def test_keys_of_the_documented_example_lie_at_the_documented_bytes(c_implementation: CApi) -> None:
    # Check 7 of the DSA data flow: page 3, offset 5.
    cache = index_cache(4, 64, 128, "fp8")
    key = np.full((1, 128), 448, np.float32)
    key[0, 7] = 1
    c_implementation.index_key_write(key=key, cache=cache, slot_mapping=np.array([3 * 64 + 5]), scale_format="ue8m0")
    flat = cache.reshape(-1)
    assert flat[25991] == 0x38
    assert flat[33556:33560].view(np.float32)[0] == 1.0


@pytest.mark.parametrize("cache_format", FORMATS)
def test_keys_do_not_depend_on_the_batch_or_on_threads(implementation: Implementation, cache_format: str) -> None:
    case = IndexKeyWriteCase(num_tokens=200, block_size=16, cache_format=cache_format)
    together = case.arguments()
    implementation.index_key_write(**together)
    for num_threads in (1, 2, 4):
        alone = case.arguments()
        for first in range(0, case.num_tokens, 37):
            part = slice(first, first + 37)
            chunk = {name: alone[name][part] for name in ("key", "slot_mapping")}
            implementation.on_threads(num_threads).index_key_write(**alone | chunk)
        assert_same(alone["cache"], together["cache"], f"cache on {num_threads} threads")
