from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.ops import reference
from tests.kit.c_api import CApi
from tests.kit.cases import Format
from tests.kit.compare import assert_same
from tests.kit.compressed_cases import CompressedMlaCase
from tests.kit.compressed_checks import check_compressed_attention, check_compressed_mla
from tests.kit.implementation import Implementation
from tests.kit.poison import invalid_ids

FORMATS: list[Format] = ["fp8", "bfloat16", "float32"]
QUERY_FORMATS: list[Any] = ["float32", "bfloat16"]
PER_ROW = ("query", "window_slots", "window_counts", "entry_slots", "entry_counts")


def rows_of(arguments: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The arguments with some rows only."""
    names = [name for name in PER_ROW if arguments[name] is not None]
    return arguments | {name: np.ascontiguousarray(arguments[name][rows]) for name in names}


def one_row(*, sink: float, cache_format: Format = "float32") -> dict[str, Any]:
    """One token with one window row, no entries and the same sink in two heads; z is 0."""
    arguments = CompressedMlaCase(
        num_tokens=1, num_heads=2, window_width=1, entry_width=0, invalid_every=0, cache_format=cache_format
    ).arguments()
    arguments["query"][...] = 0
    arguments["sinks"][...] = sink
    return arguments


@pytest.mark.parametrize("query_format", QUERY_FORMATS)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_production_dims_of_a_ratio_4_layer(
    implementation: Implementation, cache_format: Format, query_format: Any
) -> None:
    case = CompressedMlaCase(
        num_tokens=2,
        window_width=128,
        entry_width=512,
        window_counts=(128, 100),
        entry_counts=(512, 25),
        entry_block_rows=64,
        cache_format=cache_format,
        query_format=query_format,
    )
    check_compressed_mla(implementation, case)


@pytest.mark.parametrize("query_format", QUERY_FORMATS)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_dims_of_the_goldens(implementation: Implementation, cache_format: Format, query_format: Any) -> None:
    case = CompressedMlaCase(
        num_heads=6,
        head_dim=96,
        rope_dim=32,
        window_width=8,
        entry_width=9,
        window_block_rows=4,
        cache_format=cache_format,
        query_format=query_format,
    )
    check_compressed_mla(implementation, case)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 7, 8, 15, 17, 32, 64, 128])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_any_number_of_heads(implementation: Implementation, cache_format: Format, num_heads: int) -> None:
    case = CompressedMlaCase(
        num_tokens=2, num_heads=num_heads, window_width=20, entry_width=21, cache_format=cache_format, seed=num_heads
    )
    check_compressed_mla(implementation, case)


@pytest.mark.parametrize(("window_width", "entry_width"), [(1, 1), (0, 5), (128, 0), (127, 1), (128, 129), (8, 700)])
@pytest.mark.parametrize("query_format", QUERY_FORMATS)
def test_any_widths_of_the_lists(
    implementation: Implementation, query_format: Any, window_width: int, entry_width: int
) -> None:
    case = CompressedMlaCase(
        num_heads=3,
        head_dim=160,
        rope_dim=32,
        window_width=window_width,
        entry_width=entry_width,
        query_format=query_format,
        invalid_every=0,
    )
    check_compressed_mla(implementation, case)


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(4, 2), (66, 2), (130, 66), (300, 100), (1088, 64)])
@pytest.mark.parametrize("query_format", QUERY_FORMATS)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_other_dims_and_blocks(
    implementation: Implementation, cache_format: Format, query_format: Any, head_dim: int, rope_dim: int
) -> None:
    case = CompressedMlaCase(
        num_heads=5,
        head_dim=head_dim,
        rope_dim=rope_dim,
        window_block_rows=7,
        entry_block_rows=3,
        cache_format=cache_format,
        query_format=query_format,
    )
    check_compressed_mla(implementation, case)


@pytest.mark.parametrize(
    ("window_counts", "entry_counts"), [((40, 0, 1), (70, 0, 0)), ((0, 3, 39), (5, 70, 0)), ((0, 0, 0), (0, 0, 0))]
)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_slots_behind_the_counts_are_not_read(
    implementation: Implementation, cache_format: Format, window_counts: Any, entry_counts: Any
) -> None:
    case = CompressedMlaCase(window_counts=window_counts, entry_counts=entry_counts, cache_format=cache_format)
    check_compressed_mla(implementation, case)


@pytest.mark.parametrize("invalid_every", [0, 3, 5])
def test_slots_outside_the_caches_are_skipped(implementation: Implementation, invalid_every: int) -> None:
    check_compressed_mla(implementation, CompressedMlaCase(entry_width=200, invalid_every=invalid_every))


def test_v4_v05_the_sink_stands_in_the_denominator_alone(implementation: Implementation) -> None:
    # Check 9: one row, z = 0: sink 0 halves it, -inf leaves it, +inf leaves nothing; lse is 0 whatever the sink.
    for sink, factor in ((0.0, 0.5), (-np.inf, 1.0), (np.inf, 0.0), (200.0, 0.0), (-200.0, 1.0)):
        arguments = one_row(sink=sink)
        out, lse = implementation.compressed_mla(**arguments)
        row = reference.compressed_row_read(
            cache=arguments["window_cache"],
            slot_ids=arguments["window_slots"][0],
            head_dim=512,
            rope_dim=64,
            block_rows=64,
        )[0]
        assert_same(out[0], np.broadcast_to(row * np.float32(factor), (2, 512)), f"out with sink {sink}")
        assert not lse.any()


@pytest.mark.parametrize("sinks", ["random", "none"])
@pytest.mark.parametrize("logit_size", [0.0, 1e-3, 5.0, 20.0])
def test_flat_and_peaked_softmax(implementation: Implementation, logit_size: float, sinks: Any) -> None:
    check_compressed_mla(
        implementation, CompressedMlaCase(num_heads=4, entry_width=300, logit_size=logit_size, sinks=sinks)
    )


@pytest.mark.parametrize("sink", [-30.0, 30.0, 80.0])
def test_sinks_far_from_the_logits(implementation: Implementation, sink: float) -> None:
    arguments = CompressedMlaCase(num_heads=4, cache_format="float32").arguments()
    arguments["sinks"][...] = sink
    out, lse = implementation.compressed_mla(**arguments)
    check_compressed_attention(implementation, arguments, out, lse)


@pytest.mark.parametrize("query_format", QUERY_FORMATS)
def test_a_row_without_valid_slots_is_zero_with_lse_minus_infinity(
    implementation: Implementation, query_format: Any
) -> None:
    arguments = CompressedMlaCase(num_tokens=5, window_width=8, entry_width=8, query_format=query_format).arguments()
    for part in ("window", "entry"):
        num_slots = len(arguments[f"{part}_cache"]) * arguments[f"{part}_block_rows"]
        for row, invalid in enumerate(invalid_ids(num_slots, np.int32)):
            arguments[f"{part}_slots"][row] = invalid
    out, lse = implementation.compressed_mla(**arguments)
    assert not out[:4].any()
    assert np.all(np.isneginf(lse[:4]))
    assert np.all(np.isfinite(lse[4]))
    check_compressed_attention(implementation, arguments, out, lse)


def test_padding_rows_beside_others(implementation: Implementation) -> None:
    check_compressed_mla(
        implementation, CompressedMlaCase(num_tokens=4, window_counts=(0, 40, 0, 5), entry_counts=(0, 70, 0, 0))
    )


def test_repeated_slots_count_repeatedly_in_one_list_and_across_both(implementation: Implementation) -> None:
    arguments = CompressedMlaCase(num_tokens=1, window_width=3, entry_width=3, invalid_every=0).arguments()
    arguments["window_slots"][0, 1:] = arguments["window_slots"][0, 0]
    arguments |= {"entry_cache": arguments["window_cache"], "entry_block_rows": 64}
    arguments["entry_slots"][...] = arguments["window_slots"]
    out, lse = implementation.compressed_mla(**arguments)
    check_compressed_attention(implementation, arguments, out, lse)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_gaps_between_blocks_are_not_read(c_implementation: CApi, cache_format: Format) -> None:
    check_compressed_mla(c_implementation, CompressedMlaCase(cache_format=cache_format, gap_bytes=48))


def test_logits_beyond_the_range_of_exp_do_not_overflow(implementation: Implementation) -> None:
    arguments = CompressedMlaCase(num_heads=4, entry_width=300, invalid_every=0, cache_format="float32").arguments()
    for scale in (1e3, -1e3):
        out, lse = implementation.compressed_mla(**arguments | {"softmax_scale": scale})
        assert np.all(np.isfinite(out))
        assert np.all(np.abs(lse) > 200)


def test_an_empty_batch_gives_empty_results(implementation: Implementation) -> None:
    out, lse = implementation.compressed_mla(**CompressedMlaCase(num_tokens=0).arguments())
    assert out.shape == (0, 16, 512)
    assert lse.shape == (0, 16)


def test_v4_s27_padding_heads_change_nothing(cpu_implementation: Implementation) -> None:
    # Check 11: 16 live heads through 64 heads, the others with query 0 and sink -inf.
    arguments = CompressedMlaCase(num_heads=16).arguments()
    out, lse = cpu_implementation.compressed_mla(**arguments)
    query = np.zeros((3, 64, 512), np.float32)
    query[:, :16] = arguments["query"]
    sinks = np.full(64, -np.inf, np.float32)
    sinks[:16] = arguments["sinks"]
    padded_out, padded_lse = cpu_implementation.compressed_mla(**arguments | {"query": query, "sinks": sinks})
    assert_same(np.ascontiguousarray(padded_out[:, :16]), out, "out")
    assert_same(np.ascontiguousarray(padded_lse[:, :16]), lse, "lse")
    assert np.all(np.isfinite(padded_out))


@pytest.mark.parametrize("num_tokens", [1, 5, 20])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_rows_do_not_depend_on_threads(implementation: Implementation, cache_format: Format, num_tokens: int) -> None:
    arguments = CompressedMlaCase(
        num_tokens=num_tokens, num_heads=20, entry_width=400, head_dim=160, cache_format=cache_format
    ).arguments()
    out, lse = implementation.compressed_mla(**arguments)
    for num_threads in (1, 2, 4):
        threaded_out, threaded_lse = implementation.on_threads(num_threads).compressed_mla(**arguments)
        assert_same(threaded_out, out, f"out on {num_threads} threads")
        assert_same(threaded_lse, lse, f"lse on {num_threads} threads")


@pytest.mark.parametrize("query_format", QUERY_FORMATS)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_rows_do_not_depend_on_the_rows_beside_them(
    cpu_implementation: Implementation, cache_format: Format, query_format: Any
) -> None:
    case = CompressedMlaCase(
        num_tokens=8,
        num_heads=20,
        entry_width=300,
        window_counts=(40, 7, 0, 0, 39, 40, 1, 40),
        entry_counts=(300, 7, 0, 128, 129, 0, 1, 256),
        cache_format=cache_format,
        query_format=query_format,
    )
    arguments = case.arguments()
    out, lse = cpu_implementation.compressed_mla(**arguments)
    for rows in ([0], [1], [2], [4, 3], [7, 0, 5], list(range(7))):
        part_out, part_lse = cpu_implementation.compressed_mla(**rows_of(arguments, rows))
        assert_same(part_out, out[rows], f"out of rows {rows}")
        assert_same(part_lse, lse[rows], f"lse of rows {rows}")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_skipped_slots_and_wider_lists_leave_no_trace(
    cpu_implementation: Implementation, cache_format: Format
) -> None:
    arguments = CompressedMlaCase(num_heads=4, entry_width=300, invalid_every=4, cache_format=cache_format).arguments()
    out, lse = cpu_implementation.compressed_mla(**arguments)
    packed = {}
    for part in ("window", "entry"):
        slots = arguments[f"{part}_slots"]
        num_slots = len(arguments[f"{part}_cache"]) * arguments[f"{part}_block_rows"]
        packed[f"{part}_slots"] = np.stack([ids[(ids >= 0) & (ids < num_slots)] for ids in slots])
    packed_out, packed_lse = cpu_implementation.compressed_mla(**arguments | packed)
    assert_same(out, packed_out, "out")
    assert_same(lse, packed_lse, "lse")


def test_a_list_of_entries_that_is_empty_is_no_list(cpu_implementation: Implementation) -> None:
    arguments = CompressedMlaCase(entry_counts=(0, 0, 0)).arguments()
    out, lse = cpu_implementation.compressed_mla(**arguments)
    without = {"entry_cache": None, "entry_slots": None, "entry_counts": None}
    out_without, lse_without = cpu_implementation.compressed_mla(**arguments | without)
    assert_same(out, out_without, "out")
    assert_same(lse, lse_without, "lse")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_fifty_repetitions_are_identical(implementation: Implementation, cache_format: Format) -> None:
    arguments = CompressedMlaCase(num_heads=4, entry_width=300, cache_format=cache_format).arguments()
    out, lse = implementation.compressed_mla(**arguments)
    for _ in range(49):
        again_out, again_lse = implementation.compressed_mla(**arguments)
        assert_same(again_out, out, "out")
        assert_same(again_lse, lse, "lse")
