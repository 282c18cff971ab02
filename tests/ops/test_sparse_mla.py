from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.ops import reference
from tests.kit.c_api import CApi
from tests.kit.cases import Format, SparseMlaCase
from tests.kit.checks import check_attention, check_sparse_mla
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation
from tests.kit.poison import invalid_ids

FORMATS: list[Format] = ["fp8", "bfloat16", "float32"]
QUERY_FORMATS = ["float32", "bfloat16"]


def rows_of(arguments: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The arguments with some rows only."""
    names = [name for name in ("query", "slot_ids", "counts") if arguments[name] is not None]
    return arguments | {name: np.ascontiguousarray(arguments[name][rows]) for name in names}


@pytest.mark.parametrize("query_format", QUERY_FORMATS)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_production_dims_and_top_2048(implementation: Implementation, cache_format: Format, query_format: Any) -> None:
    case = SparseMlaCase(
        num_tokens=2, topk=2048, counts=(2048, 1500), cache_format=cache_format, query_format=query_format
    )
    check_sparse_mla(implementation, case)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 7, 8, 15, 17, 32, 64, 128])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_any_number_of_heads(implementation: Implementation, cache_format: Format, num_heads: int) -> None:
    case = SparseMlaCase(num_tokens=2, num_heads=num_heads, topk=40, cache_format=cache_format, seed=num_heads)
    check_sparse_mla(implementation, case)


@pytest.mark.parametrize("topk", [1, 2, 3, 16, 31, 64, 127, 128, 129, 255, 256, 300, 1000, 4096])
def test_any_width_of_the_selection(implementation: Implementation, topk: int) -> None:
    check_sparse_mla(implementation, SparseMlaCase(num_tokens=2, num_heads=3, topk=topk, kv_lora_rank=144, seed=topk))


@pytest.mark.parametrize(
    ("kv_lora_rank", "qk_rope_head_dim"), [(1, 1), (5, 3), (16, 8), (127, 7), (130, 10), (300, 33)]
)
@pytest.mark.parametrize("query_format", QUERY_FORMATS)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_odd_dims_and_blocks(
    implementation: Implementation, cache_format: Format, query_format: Any, kv_lora_rank: int, qk_rope_head_dim: int
) -> None:
    case = SparseMlaCase(
        num_heads=5,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        block_size=7,
        cache_format=cache_format,
        query_format=query_format,
    )
    check_sparse_mla(implementation, case)


@pytest.mark.parametrize("counts", [(70, 0, 1), (3, 69, 70), (0, 0, 0)])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_ids_behind_the_count_are_not_read(
    implementation: Implementation, cache_format: Format, counts: tuple[int, ...]
) -> None:
    check_sparse_mla(implementation, SparseMlaCase(counts=counts, cache_format=cache_format))


@pytest.mark.parametrize("invalid_every", [0, 3, 5])
def test_ids_outside_the_cache_are_skipped(implementation: Implementation, invalid_every: int) -> None:
    check_sparse_mla(implementation, SparseMlaCase(topk=200, invalid_every=invalid_every))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_skipped_ids_leave_no_trace(cpu_implementation: Implementation, cache_format: Format) -> None:
    arguments = SparseMlaCase(topk=300, invalid_every=4, num_heads=4, cache_format=cache_format).arguments()
    out, lse = cpu_implementation.sparse_mla(**arguments)
    valid = [ids[(ids >= 0) & (ids < 2**30)] for ids in arguments["slot_ids"]]
    num_slots = arguments["latent_cache"].shape[0] * arguments["latent_cache"].shape[2]
    packed = np.stack([ids[ids < num_slots] for ids in valid])
    packed_out, packed_lse = cpu_implementation.sparse_mla(**arguments | {"slot_ids": packed})
    assert_same(out, packed_out, "out")
    assert_same(lse, packed_lse, "lse")


@pytest.mark.parametrize("query_format", QUERY_FORMATS)
def test_dsa_t19_a_row_without_valid_ids_is_zero_with_lse_minus_infinity(
    implementation: Implementation, query_format: Any
) -> None:
    arguments = SparseMlaCase(num_tokens=5, topk=8, query_format=query_format).arguments()
    num_slots = arguments["latent_cache"].shape[0] * arguments["latent_cache"].shape[2]
    for row, invalid in enumerate(invalid_ids(num_slots, np.int32)):
        arguments["slot_ids"][row] = invalid
    out, lse = implementation.sparse_mla(**arguments)
    assert not out[:4].any()
    assert np.all(np.isneginf(lse[:4]))
    assert np.all(np.isfinite(lse[4]))
    check_attention(arguments, out, lse, rounds_weights=implementation.rounds_weights(arguments))


def test_dsa_t11_padding_rows_beside_others(implementation: Implementation) -> None:
    check_sparse_mla(implementation, SparseMlaCase(num_tokens=4, counts=(0, 70, 0, 5)))


def test_one_key_gives_its_row_and_the_natural_logarithm(implementation: Implementation) -> None:
    # Check 16: lse = scale * q . k.
    arguments = SparseMlaCase(num_tokens=1, topk=1, invalid_every=0, cache_format="float32").arguments()
    out, lse = implementation.sparse_mla(**arguments)
    row = reference.read_latent_rows(arguments["latent_cache"], arguments["slot_ids"][0], 512, 64)[0]
    assert_same(out[0], np.broadcast_to(row[:512], (16, 512)), "out")
    expected = np.float32(arguments["softmax_scale"]) * (arguments["query"][0].astype(np.float64) @ row)
    assert np.allclose(lse[0], expected, rtol=1e-5, atol=1e-6)


def test_repeated_ids_count_repeatedly(implementation: Implementation) -> None:
    arguments = SparseMlaCase(num_tokens=1, topk=6, invalid_every=0).arguments()
    arguments["slot_ids"][0, 3:] = arguments["slot_ids"][0, 0]
    out, lse = implementation.sparse_mla(**arguments)
    check_attention(arguments, out, lse, rounds_weights=implementation.rounds_weights(arguments))


@pytest.mark.parametrize("logit_size", [0.0, 1e-3, 5.0, 20.0])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_flat_and_peaked_softmax(implementation: Implementation, cache_format: Format, logit_size: float) -> None:
    case = SparseMlaCase(num_heads=4, topk=300, logit_size=logit_size, cache_format=cache_format)
    check_sparse_mla(implementation, case)


@pytest.mark.parametrize("logit_size", [0.5, 4.0])
def test_two_short_keys_leave_little_error_but_that_of_the_exponential(
    implementation: Implementation, logit_size: float
) -> None:
    case = SparseMlaCase(
        num_tokens=32,
        num_heads=32,
        topk=2,
        kv_lora_rank=4,
        qk_rope_head_dim=4,
        cache_format="float32",
        invalid_every=0,
        num_slots=64,
        logit_size=logit_size,
    )
    check_sparse_mla(implementation, case)


def test_logits_beyond_the_range_of_exp_do_not_overflow(implementation: Implementation) -> None:
    arguments = SparseMlaCase(
        num_heads=4, topk=300, invalid_every=0, logit_size=1.0, cache_format="float32"
    ).arguments()
    for scale in (1e3, -1e3):
        out, lse = implementation.sparse_mla(**arguments | {"softmax_scale": scale})
        assert np.all(np.isfinite(out))
        assert np.all(np.abs(lse) > 200)


def test_dsa_t14_plain_scales_are_read_as_they_are_stored(implementation: Implementation) -> None:
    check_sparse_mla(implementation, SparseMlaCase(scale_format="plain", query_format="bfloat16"))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_dsa_t13_gaps_between_blocks_are_not_read(c_implementation: CApi, cache_format: Format) -> None:
    check_sparse_mla(c_implementation, SparseMlaCase(cache_format=cache_format, gap_bytes=48))


def test_an_empty_batch_gives_empty_results(implementation: Implementation) -> None:
    arguments = SparseMlaCase(num_tokens=0).arguments()
    out, lse = implementation.sparse_mla(**arguments)
    assert out.shape == (0, 16, 512)
    assert lse.shape == (0, 16)


@pytest.mark.parametrize("num_tokens", [1, 5, 20])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_dsa_s72_rows_do_not_depend_on_threads(
    implementation: Implementation, cache_format: Format, num_tokens: int
) -> None:
    case = SparseMlaCase(num_tokens=num_tokens, num_heads=20, topk=400, kv_lora_rank=144, cache_format=cache_format)
    arguments = case.arguments()
    out, lse = implementation.sparse_mla(**arguments)
    for num_threads in (1, 2, 4):
        threaded_out, threaded_lse = implementation.on_threads(num_threads).sparse_mla(**arguments)
        assert_same(threaded_out, out, f"out on {num_threads} threads")
        assert_same(threaded_lse, lse, f"lse on {num_threads} threads")


@pytest.mark.parametrize("query_format", QUERY_FORMATS)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_dsa_s72_rows_do_not_depend_on_the_rows_beside_them(
    cpu_implementation: Implementation, cache_format: Format, query_format: Any
) -> None:
    counts = (400, 7, 0, 128, 129, 399, 1, 256, 300, 200, 64, 65)
    case = SparseMlaCase(
        num_tokens=12, num_heads=20, topk=400, counts=counts, cache_format=cache_format, query_format=query_format
    )
    arguments = case.arguments()
    out, lse = cpu_implementation.sparse_mla(**arguments)
    for rows in ([0], [1], [3], [4, 2], [11, 0, 5], [6, 7, 8, 9], list(range(11))):
        part_out, part_lse = cpu_implementation.sparse_mla(**rows_of(arguments, rows))
        assert_same(part_out, out[rows], f"out of rows {rows}")
        assert_same(part_lse, lse[rows], f"lse of rows {rows}")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_a_head_does_not_depend_on_the_heads_beside_it(
    cpu_implementation: Implementation, cache_format: Format
) -> None:
    arguments = SparseMlaCase(num_tokens=2, num_heads=37, topk=150, cache_format=cache_format).arguments()
    out, lse = cpu_implementation.sparse_mla(**arguments)
    for heads in (slice(0, 1), slice(3, 4), slice(5, 22), slice(36, 37)):
        part = {"query": np.ascontiguousarray(arguments["query"][:, heads])}
        part_out, part_lse = cpu_implementation.sparse_mla(**arguments | part)
        assert_same(part_out, np.ascontiguousarray(out[:, heads]), f"out of heads {heads}")
        assert_same(part_lse, np.ascontiguousarray(lse[:, heads]), f"lse of heads {heads}")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_width_of_the_selection_behind_the_count_changes_nothing(
    cpu_implementation: Implementation, cache_format: Format
) -> None:
    arguments = SparseMlaCase(topk=600, counts=(130, 70, 1), num_heads=4, cache_format=cache_format).arguments()
    out, lse = cpu_implementation.sparse_mla(**arguments)
    narrow = arguments | {"slot_ids": np.ascontiguousarray(arguments["slot_ids"][:, :130])}
    narrow_out, narrow_lse = cpu_implementation.sparse_mla(**narrow)
    assert_same(narrow_out, out, "out")
    assert_same(narrow_lse, lse, "lse")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_fifty_repetitions_are_identical(implementation: Implementation, cache_format: Format) -> None:
    arguments = SparseMlaCase(num_heads=4, topk=300, cache_format=cache_format).arguments()
    out, lse = implementation.sparse_mla(**arguments)
    for _ in range(49):
        again_out, again_lse = implementation.sparse_mla(**arguments)
        assert_same(again_out, out, "out")
        assert_same(again_lse, lse, "lse")


def test_dsa_t19_parts_merge_to_the_whole_and_empty_parts_to_nothing(implementation: Implementation) -> None:
    arguments = SparseMlaCase(num_tokens=2, topk=90, counts=(90, 0)).arguments()
    first, second = (
        implementation.sparse_mla(
            **arguments
            | {
                "slot_ids": np.ascontiguousarray(arguments["slot_ids"][:, part]),
                "counts": np.array([part.stop - part.start, 0], np.int32),
            }
        )
        for part in (slice(0, 40), slice(40, 90))
    )
    numbers = [array.astype(np.float64) for array in (*first, *second)]
    out, lse = reference.merge_attention(*numbers)
    whole_out, whole_lse = reference.sparse_mla(**arguments)
    assert np.allclose(out, whole_out, rtol=0, atol=1e-5)
    assert np.allclose(lse[0], whole_lse[0], rtol=0, atol=1e-5)
    assert not out[1].any()
    assert np.all(np.isneginf(lse[1]))
