from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference.compressed import state_place
from tests.kit.c_api import CApi
from tests.kit.cases import Format
from tests.kit.compare import assert_same
from tests.kit.compressed_cases import KvCompressCase, rejected_requests, row_cache
from tests.kit.compressed_checks import check_kv_compress, closing_rows, read_entries
from tests.kit.implementation import Implementation, Refused

FORMATS: list[Format] = ["fp8", "bfloat16", "float32"]
RATIO_4 = KvCompressCase()
RATIO_128 = KvCompressCase(
    spans=((0, 130), (250, 7), (127, 1)), ratio=128, overlap=1, state_block_tokens=8, block_rows=2
)
INDEX_KEYS = KvCompressCase(head_dim=128, entry_kind="index_key")
CASES = {"ratio 4": RATIO_4, "ratio 128": RATIO_128, "index keys": INDEX_KEYS}
STEPS = (1, 3, 4, 5, 127, 128, 129, 256)


def one_request(num_tokens: int, **changes: Any) -> dict[str, Any]:
    """All tokens of one request from position 0, entry j in slot j of a float32 cache; the ring holds everything."""
    case = KvCompressCase(spans=((0, num_tokens),), has_padding=False, entry_format="float32", **changes)
    arguments = case.arguments()
    arguments["entry_slots"] = arguments["positions"].astype(np.int64) // case.ratio
    return arguments


def entries_of(arguments: dict[str, Any]) -> Any:
    """All entries that the request closed."""
    num_entries = len(arguments["positions"]) // arguments["ratio"]
    return arguments["entry_cache"].reshape(-1, len(arguments["norm_weight"]))[:num_entries]


def run_in_steps(implementation: Implementation, arguments: dict[str, Any], step: int) -> None:
    """The call cut into calls of so many tokens."""
    per_row = ("kv_score", "cos", "sin", "positions", "request_ids", "lengths", "entry_slots")
    for first in range(0, len(arguments["positions"]), step):
        rows = {name: np.ascontiguousarray(arguments[name][first : first + step]) for name in per_row}
        implementation.kv_compress(**arguments | rows)


@pytest.mark.parametrize("entry_format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_production_dims(implementation: Implementation, name: str, entry_format: Format) -> None:
    check_kv_compress(implementation, replace(CASES[name], entry_format=entry_format))


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(96, 32), (4, 2), (66, 2), (130, 66), (300, 100)])
@pytest.mark.parametrize("overlap", [1, 2])
def test_other_dims(implementation: Implementation, overlap: int, head_dim: int, rope_dim: int) -> None:
    case = KvCompressCase(
        overlap=overlap, head_dim=head_dim, rope_dim=rope_dim, state_block_tokens=3, block_rows=5, seed=head_dim
    )
    check_kv_compress(implementation, case)


@pytest.mark.parametrize("ratio", [1, 2, 3, 8, 200])
@pytest.mark.parametrize("overlap", [1, 2])
def test_other_ratios(implementation: Implementation, overlap: int, ratio: int) -> None:
    spans = ((0, 3 * ratio), (2 * ratio, ratio), (ratio - 1, 1))
    check_kv_compress(implementation, KvCompressCase(spans=spans, ratio=ratio, overlap=overlap, head_dim=96))


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(64, 32), (4, 2), (128, 126)])
@pytest.mark.parametrize("scale_format", ["ue8m0", "plain"])
def test_index_keys_of_other_dims_and_scales(
    implementation: Implementation, scale_format: Any, head_dim: int, rope_dim: int
) -> None:
    case = replace(
        INDEX_KEYS, head_dim=head_dim, rope_dim=rope_dim, scale_format=scale_format, block_rows=4, seed=head_dim
    )
    check_kv_compress(implementation, case)


@pytest.mark.parametrize("name", CASES)
def test_gaps_between_blocks_and_rows_stay_as_they_are(c_implementation: CApi, name: str) -> None:
    check_kv_compress(c_implementation, replace(CASES[name], gap_bytes=48, has_row_strides=True))


@pytest.mark.parametrize("name", CASES)
def test_strided_rows_are_read_as_their_contiguous_copies(implementation: Implementation, name: str) -> None:
    check_kv_compress(implementation, replace(CASES[name], has_row_strides=True))


@pytest.mark.parametrize("score_size", [0.0, 5.0, 50.0])
@pytest.mark.parametrize("name", CASES)
def test_flat_and_peaked_weights(implementation: Implementation, name: str, score_size: float) -> None:
    check_kv_compress(implementation, replace(CASES[name], score_size=score_size))


def test_a_call_without_tokens_changes_nothing(implementation: Implementation) -> None:
    check_kv_compress(implementation, KvCompressCase(spans=((0, 0),), has_padding=False))


def test_a_call_of_padding_rows_changes_nothing(implementation: Implementation) -> None:
    check_kv_compress(implementation, KvCompressCase(spans=((0, 0), (5, 0))))


def test_v4_v03_overlapping_windows_by_hand(implementation: Implementation) -> None:
    # Check 3: r 4, width 1: Ca = t, Cb = 10 t; entries 15 and 28.25. Here width 4, and the norm divides by the value.
    arguments = one_request(8, head_dim=4, rope_dim=2)
    t = np.arange(8, dtype=np.float32)[:, None]
    ca, cb = t * [1, 0, 0, 0], 10 * t * [1, 0, 0, 0]
    ca[:, 1] = cb[:, 1] = 1.0  # a channel whose mean is known tells the size that the norm divides by
    arguments["kv_score"] = np.concatenate([ca, cb, np.zeros((8, 8))], -1).astype(np.float32)
    arguments["ape"][...] = 0
    arguments["norm_weight"][...] = 1
    implementation.kv_compress(**arguments)
    entries = entries_of(arguments)
    assert np.allclose(entries[:, 0] / entries[:, 1], [15, 28.25], rtol=1e-6)


def test_plain_windows_by_hand(implementation: Implementation) -> None:
    # Check 3: r 128, value t: entries 63.5 and 191.5.
    arguments = one_request(256, head_dim=4, rope_dim=2, ratio=128, overlap=1)
    t = np.arange(256, dtype=np.float32)[:, None]
    arguments["kv_score"] = np.concatenate([t * [1, 0, 0, 0] + [0, 1, 0, 0], np.zeros((256, 4))], -1)
    arguments["kv_score"] = arguments["kv_score"].astype(np.float32)
    arguments["ape"][...] = 0
    arguments["norm_weight"][...] = 1
    implementation.kv_compress(**arguments)
    entries = entries_of(arguments)
    assert np.allclose(entries[:, 0] / entries[:, 1], [63.5, 191.5], rtol=1e-6)


def test_v4_v02_entries_are_rotated_by_the_angles_of_their_row(implementation: Implementation) -> None:
    arguments = one_request(8, head_dim=96, rope_dim=32)
    unrotated = arguments | {
        "cos": np.ones_like(arguments["cos"]),
        "sin": np.zeros_like(arguments["sin"]),
        "entry_cache": np.zeros_like(arguments["entry_cache"]),
    }
    implementation.kv_compress(**unrotated)
    implementation.kv_compress(**arguments)
    plain, turned = entries_of(unrotated), entries_of(arguments)
    assert_same(np.ascontiguousarray(turned[:, :64]), np.ascontiguousarray(plain[:, :64]), "value part")
    closing = [3, 7]
    exact = reference.compressed.rotated(
        plain[:, 64:].astype(np.float64), arguments["cos"][closing], arguments["sin"][closing]
    )
    assert np.abs(turned[:, 64:] - exact).max() < 1e-6
    assert np.abs(turned[:, 64:] - plain[:, 64:])[1].max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_v4_s18_entries_and_states_are_the_same_bits_for_any_cut_into_steps(
    implementation: Implementation, name: str
) -> None:
    # Check 4, of float32 entries: fp8 would hide bits.
    changes = {
        field: getattr(CASES[name], field)
        for field in ("ratio", "overlap", "head_dim", "entry_kind", "state_block_tokens", "block_rows")
    }
    if implementation.name == "c_cpu-scalar" or not implementation.takes_block_gaps:
        changes["head_dim"] = 96  # slow, or every call copies its caches
    num_tokens = 1000
    whole = one_request(num_tokens, **changes)
    implementation.kv_compress(**whole)
    assert len(entries_of(whole)) == num_tokens // whole["ratio"]
    assert np.all(np.isfinite(entries_of(whole)))
    for step in STEPS:
        cut = one_request(num_tokens, **changes)
        run_in_steps(implementation, cut, step)
        assert_same(cut["entry_cache"], whole["entry_cache"], f"entries in steps of {step}")
        assert_same(cut["state_cache"], whole["state_cache"], f"states in steps of {step}")


@pytest.mark.parametrize("ratio", [4, 128])
def test_v4_v01_a_token_makes_the_entries_that_positions_up_to_it_close(
    implementation: Implementation, ratio: int
) -> None:
    # Check 5, by brute force over positions 0 .. 1100: after the token at pos, (pos + 1) // ratio entries are there.
    overlap = 2 if ratio == 4 else 1
    arguments = one_request(1101, ratio=ratio, overlap=overlap, head_dim=4, rope_dim=2)
    unwritten = entries_of(arguments).copy()
    assert np.all(np.isnan(unwritten))
    known = {0: (0, 0), 2: (0, 0), 3: (1, 0), 4: (1, 0), 7: (2, 0), 126: (31, 0), 127: (32, 1), 255: (64, 2)}
    known[1000] = (250, 7)
    for position in range(1101):
        row = {
            name: np.ascontiguousarray(arguments[name][position : position + 1])
            for name in ("kv_score", "cos", "sin", "positions", "request_ids", "lengths", "entry_slots")
        }
        implementation.kv_compress(**arguments | row)
        written = int(np.isfinite(entries_of(arguments)).all(-1).sum())
        assert written == (position + 1) // ratio
        if position in known:
            assert written == known[position][0 if ratio == 4 else 1]


def test_rows_do_not_depend_on_threads(implementation: Implementation) -> None:
    for case in (RATIO_4, RATIO_128):
        long = replace(case, spans=((0, 300), (7, 600)))  # enough work for several threads
        whole = long.arguments()
        implementation.kv_compress(**whole)
        for num_threads in (1, 2, 4):
            arguments = long.arguments()
            implementation.on_threads(num_threads).kv_compress(**arguments)
            assert_same(arguments["entry_cache"], whole["entry_cache"], f"entries on {num_threads} threads")
            assert_same(arguments["state_cache"], whole["state_cache"], f"states on {num_threads} threads")


@pytest.mark.parametrize("columns", [0, 5])
def test_the_table_is_a_ring(implementation: Implementation, columns: int) -> None:
    # Positions so far on that every column is used several times over before.
    case = KvCompressCase(spans=((1000, 9), (517, 4)), extra_columns=columns, head_dim=96, rope_dim=32)
    check_kv_compress(implementation, case)


@pytest.mark.parametrize(("missing", "nan_entries"), [(5, [0]), (9, [0, 1])])
@pytest.mark.parametrize("entry_format", FORMATS)
def test_a_member_without_a_state_makes_the_whole_entry_nan(
    implementation: Implementation, entry_format: Format, missing: int, nan_entries: list[int]
) -> None:
    # A member of an earlier call, and one of this call, whose row finds no place for its state.
    case = KvCompressCase(spans=((8, 12),), has_padding=False, entry_format=entry_format, extra_columns=3)
    arguments = case.arguments()
    arguments["entry_slots"][[3, 7, 11]] = [5, 70, 9]  # of the entries that positions 11, 15 and 19 close
    ring, cache = arguments["state_table"][0], arguments["state_cache"]
    ring[missing // case.state_block_tokens % len(ring)] = -1
    assert state_place(missing, ring, cache)[0] == -1
    implementation.kv_compress(**arguments)
    rows = reference.compressed_row_read(
        cache=arguments["entry_cache"], slot_ids=np.array([5, 70, 9]), head_dim=512, rope_dim=64, block_rows=64
    )
    for entry, row in enumerate(rows):
        assert np.isnan(row).all() if entry in nan_entries else np.isfinite(row).all()


def test_a_row_without_a_state_slot_writes_none(implementation: Implementation) -> None:
    case = KvCompressCase(spans=((16, 3),), has_padding=False, entry_format="float32", extra_columns=3)
    arguments, untouched = case.arguments(), case.arguments()
    for invalid in (-1, len(arguments["state_cache"]), np.iinfo(np.int32).max, np.iinfo(np.int32).min):
        arguments["state_table"][...] = invalid
        implementation.kv_compress(**arguments)
        assert_same(arguments["state_cache"], untouched["state_cache"], "state_cache")


def test_a_special_number_among_scores_reaches_its_channel_alone_before_the_norm(
    implementation: Implementation,
) -> None:
    # -inf is a weight of 0; NaN and +inf have no mean, so that the norm makes the whole entry NaN.
    for value, is_finite in ((-np.inf, True), (np.inf, False), (np.nan, False)):
        arguments = one_request(4, head_dim=96, rope_dim=32)
        arguments["kv_score"][2, 3 * 96 + 5] = value
        implementation.kv_compress(**arguments)
        entry = entries_of(arguments)[0]
        assert np.isfinite(entry).all() if is_finite else np.isnan(entry).all()


@pytest.mark.parametrize("name", ["positions", "request_ids"])
def test_values_out_of_range_are_refused_and_nothing_is_written(cpu_implementation: Implementation, name: str) -> None:
    values = rejected_requests(len(RATIO_4.spans)) if name == "request_ids" else [-1, np.iinfo(np.int32).min]
    for value in values:
        arguments, untouched = RATIO_4.arguments(), RATIO_4.arguments()
        arguments[name][-2] = value
        arguments["lengths"][-2] = 1
        with pytest.raises((Refused, ValueError)):
            cpu_implementation.kv_compress(**arguments)
        for cache in ("state_cache", "entry_cache"):
            assert_same(arguments[cache], untouched[cache], cache)


def test_slots_and_pages_by_hand(implementation: Implementation) -> None:
    # Check 7: pos 1023, r 4, table [9, 8, 7, 6]: slot 6 * 64 + 63 = 447, whose data lie at 6 * 37440 + 63 * 576.
    case = KvCompressCase(spans=((1023, 1),), has_padding=False)
    arguments = case.arguments()
    arguments["entry_cache"] = row_cache(10, 64, 512, 64, "fp8")
    arguments["entry_slots"][0] = 447
    implementation.kv_compress(**arguments)
    flat = arguments["entry_cache"].reshape(-1)
    written = np.flatnonzero(flat != 0xFF)
    assert written.min() >= 6 * 37440 + 63 * 576
    assert written[written < 6 * 37440 + 64 * 576].size > 500
    assert set(written[written >= 6 * 37440 + 64 * 576]) == set(range(6 * 37440 + 36864 + 63 * 8, 6 * 37440 + 37376))


def test_closing_rows_of_a_case_are_those_that_matter(cpu_implementation: Implementation) -> None:
    arguments = replace(RATIO_4, entry_format="float32").arguments()
    rows = closing_rows(arguments)
    assert {int(p) for p in arguments["positions"][rows]} <= {3, 7, 127, 131, 133} | {3}
    cpu_implementation.kv_compress(**arguments)
    assert np.all(np.isfinite(read_entries(arguments, rows)))
