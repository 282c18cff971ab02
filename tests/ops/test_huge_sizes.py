"""No size in a params struct overflows a product inside an op: it is refused, or harmless.

A missing check would write somewhere in memory, so every attempt is made in one process of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.kit.attempts import outcomes_of, print_outcomes
from tests.kit.c_api import CApi
from tests.kit.implementation import Unavailable
from tests.kit.implementations import implementations
from tests.kit.poison import GuardedMemory
from tests.ops.test_c_abi import CODES, FIELDS, OPS, fields_of, host_params, status_of

INT64 = (1 << 31, 1 << 60, 1 << 62, (1 << 63) - 1, -1)
INT32 = ((1 << 31) - 1, -(1 << 31), -1)

BUDGET = ("index_select", "max_logits_bytes")  # any amount is one

# What the op cannot know to be a lie: the sizes of the caller's arrays. Refused only where a product overflows.
OUTPUT_WIDTHS = {("topk_slots", "topk"), ("index_select", "topk")}


def attempts(op: str, name: str, kind: type) -> list[int]:
    """The values that are tried for a field of a params struct."""
    if (op, name) in OUTPUT_WIDTHS:
        return [-(1 << 31), -1]
    if kind is ctypes.c_int32:
        return list(INT32)
    return [1 << 62, (1 << 63) - 1, -1] if "stride" in name else list(INT64)


SIZES = [
    (op, name, value)
    for op, name, kind in FIELDS
    if kind in {ctypes.c_int32, ctypes.c_int64} and not name.endswith((*CODES, "batch_invariant"))
    for value in attempts(op, name, kind)
]


def c_implementations(c_library: Path) -> Iterator[CApi]:
    """Those that this machine runs."""
    for name, make in implementations(c_library).items():
        try:
            found = make() if name.startswith("c_") else None
        except Unavailable:
            continue
        if isinstance(found, CApi):
            yield found


def attempts_of(implementation: CApi) -> Iterator[tuple[tuple[Any, ...], Callable[[], str]]]:
    """Every attempt with its key."""
    for op, name, value in SIZES:
        key = (implementation.name, op, name, value)
        yield key, partial(status_of, implementation, op, **{name: value})


def report(c_library: str) -> None:
    """Make every attempt; run by the fixture in another process."""
    for implementation in c_implementations(Path(c_library)):
        print_outcomes(attempts_of(implementation))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[tuple[Any, ...], str]:
    """What became of each attempt; those behind a crash are missing."""
    return outcomes_of(__name__, str(request.config.getoption("--c-library")))


@pytest.mark.parametrize(("op", "name"), sorted({(op, name) for op, name, _ in SIZES}))
def test_a_huge_field_is_a_bad_shape(
    outcomes: dict[tuple[Any, ...], str], c_implementation: CApi, op: str, name: str
) -> None:
    tried = [value for at, field, value in SIZES if (at, field) == (op, name)]
    found = {value: outcomes.get((c_implementation.name, op, name, value), "not reached") for value in tried}
    is_budget = (op, name) == BUDGET
    assert found == {value: "DSA_OK" if is_budget and value > 0 else "DSA_BAD_SHAPE" for value in tried}


@pytest.mark.parametrize("op", OPS)
def test_no_number_of_threads_is_too_large(c_implementation: CApi, op: str) -> None:
    assert status_of(c_implementation.on_threads((1 << 31) - 1), op) == "DSA_OK"


def test_a_max_length_beyond_the_block_table_needs_no_memory(c_implementation: CApi) -> None:
    fields = fields_of(c_implementation, "index_select")
    capacity = fields["max_blocks"] * fields["block_size"]
    needed = {
        c_implementation.workspace_bytes(
            "index_select", host_params(c_implementation, "index_select", max_length=max_length)
        )
        for max_length in (capacity, capacity + 1, (1 << 31) - 1)
    }
    assert len(needed) == 1
    c_implementation.call("index_select", GuardedMemory(), **fields | {"max_length": (1 << 31) - 1})


def test_a_layout_whose_bytes_exceed_int64_is_none(c_implementation: CApi) -> None:
    library = c_implementation.library
    largest = (1 << 31) - 1
    assert library.call("dsa_index_block_bytes", library.headers.constants["DSA_FLOAT32"], largest, largest) == -1
    for name in ("DSA_FLOAT32", "DSA_BFLOAT16", "DSA_FP8"):
        row_bytes = library.call("dsa_latent_row_bytes", library.headers.constants[name], largest, largest)
        assert int(str(row_bytes)) > largest
