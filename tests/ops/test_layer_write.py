from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kit.c_api import CApi
from tests.kit.cases import Format, LayerWriteCase
from tests.kit.checks import check_layer_write
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation, Refused
from tests.kit.poison import POISON_BYTE, GuardedMemory, whole_memory
from tests.ops.test_c_abi import fields_of

FORMATS: list[Format] = ["fp8", "bfloat16", "float32"]
PARTS = ("latent", "index_key", "index_query")


@pytest.mark.parametrize("input_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("index_format", FORMATS)
@pytest.mark.parametrize("latent_format", FORMATS)
def test_production_rows_are_those_of_the_three_ops(
    implementation: Implementation, latent_format: Format, index_format: Format, input_format: str
) -> None:
    case = LayerWriteCase(latent_format=latent_format, index_format=index_format, input_format=input_format)
    check_layer_write(implementation, case)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 7, 8, 64, 300])
def test_any_number_of_tokens(implementation: Implementation, num_tokens: int) -> None:
    check_layer_write(implementation, LayerWriteCase(num_tokens=num_tokens))


@pytest.mark.parametrize(("kv_lora_rank", "qk_rope_head_dim"), [(1, 1), (127, 7), (130, 10)])
@pytest.mark.parametrize(("index_n_heads", "index_head_dim"), [(1, 1), (3, 17), (32, 100)])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_odd_dims(
    implementation: Implementation,
    cache_format: Format,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    index_n_heads: int,
    index_head_dim: int,
) -> None:
    case = LayerWriteCase(
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        index_n_heads=index_n_heads,
        index_head_dim=index_head_dim,
        block_size=4,
        latent_format=cache_format,
        index_format=cache_format,
        input_format="float32",
    )
    check_layer_write(implementation, case)


def test_plain_scales(implementation: Implementation) -> None:
    check_layer_write(implementation, LayerWriteCase(scale_format="plain"))


@pytest.mark.parametrize("index_n_heads", [1, 16, 32, 64, 128])
def test_any_number_of_heads(implementation: Implementation, index_n_heads: int) -> None:
    check_layer_write(implementation, LayerWriteCase(num_tokens=9, index_n_heads=index_n_heads))


def test_strided_inputs_are_read_as_their_contiguous_copies(implementation: Implementation) -> None:
    check_layer_write(implementation, LayerWriteCase(has_row_strides=True))


def test_gaps_between_blocks_stay_as_they_are(c_implementation: CApi) -> None:
    check_layer_write(c_implementation, LayerWriteCase(gap_bytes=48))


def test_slots_outside_the_caches_are_skipped(implementation: Implementation) -> None:
    arguments = LayerWriteCase(num_tokens=8).arguments()
    limits = np.iinfo(np.int64)
    num_slots = arguments["latent_cache"].shape[0] * 64
    arguments["slot_mapping"][:] = [-1, limits.min, limits.max, num_slots, num_slots + 1, -(2**31), -(2**32), 2**32]
    implementation.layer_write(**arguments)
    for name in ("latent_cache", "index_cache"):
        assert np.all(arguments[name] == POISON_BYTE)


@pytest.mark.parametrize("left_out", PARTS)
def test_a_part_that_is_left_out_is_not_looked_at(c_implementation: CApi, left_out: str) -> None:
    fields = fields_of(c_implementation, "layer_write")
    arrays = {name: array for name, array in fields.items() if name.startswith(left_out) and is_array(array)}
    before = {name: whole_memory(array).copy() for name, array in arrays.items()}
    nothing = dict.fromkeys(arrays) | {f"{left_out}.num_tokens": 0, f"{left_out}.num_blocks": 0}
    nothing = {name: value for name, value in nothing.items() if name in fields}
    c_implementation.call("layer_write", GuardedMemory(), **fields | nothing)
    for name, array in arrays.items():
        assert_same(whole_memory(array), before[name], name)
    assert not np.all(fields["latent.cache" if left_out != "latent" else "index_key.cache"] == POISON_BYTE)


@pytest.mark.parametrize("part", PARTS)
def test_a_refused_part_leaves_all_three_undone(c_implementation: CApi, part: str) -> None:
    fields = fields_of(c_implementation, "layer_write")
    targets = ("latent.cache", "index_key.cache", "index_query.quantized", "index_query.folded_weights")
    before = {name: whole_memory(fields[name]).copy() for name in targets}
    name = "output_format" if part == "index_query" else "cache_format"
    with pytest.raises(Refused):
        c_implementation.call("layer_write", GuardedMemory(), **fields | {f"{part}.{name}": 77})
    for name in targets:
        assert_same(whole_memory(fields[name]), before[name], name)


def test_parts_with_different_numbers_of_tokens_are_refused(c_implementation: CApi) -> None:
    fields = fields_of(c_implementation, "layer_write")
    for part in PARTS:
        with pytest.raises(Refused, match="size"):
            c_implementation.call("layer_write", GuardedMemory(), **fields | {f"{part}.num_tokens": 3})


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)
