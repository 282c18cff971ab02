"""One check per op of compressed attention; see checks.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference.compressed import index_key_blocks
from tests.kit.checks import LOOSEST_BFLOAT16, OUT_SQUARE_ERROR, assert_same_memory
from tests.kit.compare import LOOSEST_BOUND, assert_close, assert_same, relative_square_error
from tests.kit.compressed_cases import (
    CompressedMlaCase,
    CompressedRowReadCase,
    CompressedRowWriteCase,
    InverseRopeCase,
    KvCompressCase,
)
from tests.kit.compressed_tolerances import compressed_mla_bound, entry_and_bound, inverse_rope_bound
from tests.kit.implementation import Implementation


def check_compressed_row_write(implementation: Implementation, case: CompressedRowWriteCase) -> None:
    """Every byte of the cache, its gaps and its guards."""
    actual, expected = case.arguments(), case.arguments()
    implementation.compressed_row_write(**actual)
    reference.compressed_row_write(**expected)
    assert_same_memory(actual["cache"], expected["cache"], "cache")


def check_compressed_row_read(implementation: Implementation, case: CompressedRowReadCase) -> None:
    """Every bit."""
    arguments = case.arguments()
    assert_same(implementation.compressed_row_read(**arguments), reference.compressed_row_read(**arguments), "rows")


def closing_rows(arguments: dict[str, Any]) -> list[int]:
    """The rows of a call that make an entry."""
    num_slots = len(arguments["entry_cache"]) * arguments["block_rows"]
    slots, positions = arguments["entry_slots"], arguments["positions"].astype(np.int64)
    is_closing = (arguments["lengths"] > 0) & ((positions + 1) % arguments["ratio"] == 0)
    return [int(t) for t in np.flatnonzero(is_closing & (slots >= 0) & (slots < num_slots))]


def check_kv_compress(implementation: Implementation, case: KvCompressCase) -> None:
    """States bit for bit; entries within their bound as float32, and as their format packs exactly those.

    Every other byte of both caches, their gaps and their guards are left as they are.
    """
    exact = replace(case, entry_format="float32").arguments()
    states = case.arguments()
    implementation.kv_compress(**exact)
    reference.kv_compress(**states)
    assert_same_memory(exact["state_cache"], states["state_cache"], "state_cache")
    closing = closing_rows(exact)
    entries = read_entries(exact, closing)
    for t, entry in zip(closing, entries, strict=True):
        expected, bound = entry_and_bound(states, t)
        assert_close(entry, expected, bound, f"entry of row {t}")
    assert_entries_alone(replace(case, entry_format="float32"), exact, closing, entries)
    if case.entry_format != "float32":
        actual = case.arguments()
        implementation.kv_compress(**actual)
        assert_same_memory(actual["state_cache"], states["state_cache"], "state_cache")
        assert_entries_alone(case, actual, closing, entries)


def assert_entries_alone(
    case: KvCompressCase, actual: dict[str, Any], rows: list[int], entries: NDArray[np.float32]
) -> None:
    """The entry cache holds these entries, packed by the definition, and is otherwise as the case made it."""
    expected = case.arguments()
    write_entries(expected, rows, entries)
    assert_same_memory(actual["entry_cache"], expected["entry_cache"], "entry_cache")


def read_entries(arguments: dict[str, Any], rows: list[int]) -> NDArray[np.float32]:
    """What the float32 entry cache holds for these rows."""
    slots, block_rows = arguments["entry_slots"][rows], arguments["block_rows"]
    entries: NDArray[np.float32] = arguments["entry_cache"][slots // block_rows, slots % block_rows]
    return entries


def write_entries(arguments: dict[str, Any], rows: list[int], entries: NDArray[np.float32]) -> None:
    """Pack float32 entries into the entry cache by the definition."""
    slots, cache, block_rows = arguments["entry_slots"][rows], arguments["entry_cache"], arguments["block_rows"]
    if arguments["entry_kind"] == "index_key":
        keys = index_key_blocks(cache, block_rows, entries.shape[1])
        reference.index_key_write(key=entries, cache=keys, slot_mapping=slots, scale_format=arguments["scale_format"])
    else:
        reference.compressed_row_write(
            rows=entries, cache=cache, slot_mapping=slots, rope_dim=arguments["rope_dim"], block_rows=block_rows
        )


def check_compressed_mla(implementation: Implementation, case: CompressedMlaCase) -> tuple[NDArray[Any], NDArray[Any]]:
    """out and lse within their derived bounds. Returns both as the implementation gave them."""
    arguments = case.arguments()
    out, lse = implementation.compressed_mla(**arguments)
    check_compressed_attention(implementation, arguments, out, lse)
    return out, lse


def check_compressed_attention(
    implementation: Implementation, arguments: dict[str, Any], out: NDArray[Any], lse: NDArray[Any]
) -> None:
    """As check_compressed_mla, for results that exist already."""
    assert out.dtype == arguments["query"].dtype
    assert lse.dtype == np.float32
    rounds_weights = implementation.rounds_compressed_weights(arguments)
    expected_out, expected_lse = reference.compressed_mla(**arguments)
    out_bound, lse_bound = compressed_mla_bound(arguments, expected_out, expected_lse, rounds_weights=rounds_weights)
    loosest = LOOSEST_BFLOAT16 if rounds_weights else LOOSEST_BOUND
    assert_close(reference.decode(out), expected_out, out_bound, "out", loosest=loosest)
    assert_close(lse, expected_lse, lse_bound, "lse")
    assert not relative_square_error(reference.decode(out), expected_out) > OUT_SQUARE_ERROR


def check_inverse_rope(implementation: Implementation, case: InverseRopeCase) -> None:
    """Rotated numbers within their bound, the others as they were."""
    actual, before = case.arguments(), case.arguments()
    implementation.inverse_rope(**actual)
    expected = case.arguments()
    exact = expected | {"x": reference.decode(expected["x"])}
    reference.inverse_rope(**exact)
    kept = case.head_dim - case.rope_dim
    assert_same(np.ascontiguousarray(actual["x"][..., :kept]), np.ascontiguousarray(before["x"][..., :kept]), "x")
    turned = reference.decode(actual["x"])[..., kept:]
    assert_close(turned, exact["x"][..., kept:].astype(np.float64), inverse_rope_bound(before), "x")
