from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference.caches import LatentFields
from tests.kit.c_api import CApi
from tests.kit.cases import MlaCacheWriteCase
from tests.kit.cases.common import latent_cache
from tests.kit.checks import check_mla_cache_write
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation
from tests.kit.poison import POISON_BYTE

FORMATS = ["fp8", "bfloat16", "float32"]


def written_row(implementation: Implementation, latent: np.ndarray[Any, Any], scale_format: str) -> Any:
    """The fp8 bytes of one row of the latent with a zero rope."""
    cache = latent_cache(2, 4, latent.size, 2, "fp8")
    implementation.mla_cache_write(
        latent=latent[None].astype(np.float32),
        rope=np.zeros((1, 2), np.float32),
        cache=cache,
        slot_mapping=np.array([5]),
        scale_format=scale_format,
    )
    return cache[1, 0, 1]


@pytest.mark.parametrize("input_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_production_rows_have_the_bytes_of_the_definition(
    implementation: Implementation, cache_format: str, input_format: str
) -> None:
    check_mla_cache_write(
        implementation, MlaCacheWriteCase(num_tokens=150, cache_format=cache_format, input_format=input_format)
    )


@pytest.mark.parametrize(
    ("kv_lora_rank", "qk_rope_head_dim"), [(1, 1), (5, 3), (127, 7), (128, 2), (130, 10), (300, 33)]
)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_odd_dims_have_the_bytes_of_the_definition(
    implementation: Implementation, cache_format: str, kv_lora_rank: int, qk_rope_head_dim: int
) -> None:
    check_mla_cache_write(
        implementation,
        MlaCacheWriteCase(
            kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim, block_size=3, cache_format=cache_format
        ),
    )


@pytest.mark.parametrize("input_format", ["float32", "bfloat16"])
def test_plain_scales_are_the_wanted_scales(implementation: Implementation, input_format: str) -> None:
    check_mla_cache_write(implementation, MlaCacheWriteCase(scale_format="plain", input_format=input_format))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_strided_inputs_are_read_as_their_contiguous_copies(implementation: Implementation, cache_format: str) -> None:
    case = MlaCacheWriteCase(cache_format=cache_format, input_format="bfloat16", has_row_strides=True)
    check_mla_cache_write(implementation, case)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_gaps_between_blocks_stay_as_they_are(c_implementation: CApi, cache_format: str) -> None:
    check_mla_cache_write(c_implementation, MlaCacheWriteCase(cache_format=cache_format, gap_bytes=48))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_an_empty_batch_changes_nothing(implementation: Implementation, cache_format: str) -> None:
    check_mla_cache_write(implementation, MlaCacheWriteCase(num_tokens=0, cache_format=cache_format))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_slots_outside_the_cache_are_skipped(implementation: Implementation, cache_format: str) -> None:
    arguments = MlaCacheWriteCase(num_tokens=8, cache_format=cache_format).arguments()
    num_slots = arguments["cache"].shape[0] * arguments["cache"].shape[2]
    limits = np.iinfo(np.int64)
    arguments["slot_mapping"][:] = [-1, limits.min, limits.max, num_slots, num_slots + 1, -(2**31), -(2**32), 2**32]
    implementation.mla_cache_write(**arguments)
    assert np.all(arguments["cache"].copy().view(np.uint8) == POISON_BYTE)


@pytest.mark.parametrize(("amax", "scale"), [(0.0, 2.0**-13), (1.0, 2.0**-8), (448.0, 1.0), (450.0, 2.0)])
def test_scale_of_a_group_is_the_next_power_of_two(implementation: Implementation, amax: float, scale: float) -> None:
    row = written_row(implementation, np.array([amax, 0, 0, 0]), "ue8m0")
    assert row[4:8].copy().view(np.float32)[0] == scale


def test_the_floor_of_a_plain_scale_is_the_smallest_normal_number(implementation: Implementation) -> None:
    row = written_row(implementation, np.zeros(4), "plain")
    assert row[4:8].copy().view(np.float32)[0] == np.float32(2.0**-126)


def test_infinite_numbers_saturate_with_their_neighbours_at_zero_or_nan(implementation: Implementation) -> None:
    latent = np.array([1.0, np.inf, -2.0, 0.0])
    with np.errstate(invalid="ignore"):
        row = written_row(implementation, latent, "plain")
    assert row[4:8].copy().view(np.float32)[0] == np.inf
    assert row[:4].tolist() == [0x00, 0x7F, 0x80, 0x00]


def test_padding_bytes_are_zero_so_that_equal_tokens_give_equal_rows(implementation: Implementation) -> None:
    cache = latent_cache(1, 1, 5, 3, "fp8")
    implementation.mla_cache_write(
        latent=np.ones((1, 5), np.float32),
        rope=np.ones((1, 3), np.float32),
        cache=cache,
        slot_mapping=np.array([0]),
        scale_format="ue8m0",
    )
    row, fields = cache[0, 0, 0], LatentFields(5, 3)
    assert not row[5 : fields.scale_offset].any()
    assert not row[fields.rope_offset + 6 :].any()


@pytest.mark.parametrize("cache_format", FORMATS)
def test_rows_do_not_depend_on_the_batch_or_on_threads(implementation: Implementation, cache_format: str) -> None:
    case = MlaCacheWriteCase(num_tokens=200, block_size=16, cache_format=cache_format)
    together = case.arguments()
    implementation.mla_cache_write(**together)
    for num_threads in (1, 2, 4):
        alone = case.arguments()
        for first in range(0, case.num_tokens, 37):
            part = slice(first, first + 37)
            chunk = {name: alone[name][part] for name in ("latent", "rope", "slot_mapping")}
            implementation.on_threads(num_threads).mla_cache_write(**alone | chunk)
        assert_same(alone["cache"], together["cache"], f"cache on {num_threads} threads")


def test_rows_of_the_documented_example_lie_at_the_documented_bytes(c_implementation: CApi) -> None:
    # Check 7 of the DSA data flow: slot 197 with blocks of 64 rows.
    cache = latent_cache(4, 64, 512, 64, "fp8")
    latent, rope = np.ones((1, 512), np.float32), np.zeros((1, 64), np.float32)
    latent[0, 256:384] = 448
    rope[0, 10] = 1
    c_implementation.mla_cache_write(
        latent=latent, rope=rope, cache=cache, slot_mapping=np.array([197]), scale_format="ue8m0"
    )
    flat = cache.reshape(-1)
    assert flat[129232] == reference.e4m3_encode(256.0)
    assert flat[129752:129756].view(np.float32)[0] == 1.0
    assert flat[129780:129782].view(np.uint16)[0] == 0x3F80
