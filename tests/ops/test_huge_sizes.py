"""No number that a caller may pass overflows a product inside an op: it is refused by name, or harmless.

A missing check would write somewhere in memory, so every attempt is made in one process of its own.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdeploy_dsa import ops
from fastdeploy_dsa.ops.library import C_LIBRARY, run_op
from tests.kit.implementations import CCpu, Unavailable, implementations
from tests.kit.poison import GuardedMemory
from tests.ops.test_c_abi import FIELDS, OPS, fields_of, status_of
from tests.test_ops_arguments import FITTING

ROOT = Path(__file__).resolve().parents[2]

INT64 = (1 << 31, 1 << 60, 1 << 62, (1 << 63) - 1, -1)
INT32 = ((1 << 31) - 1, -(1 << 31), -1)

ATTRIBUTES = [(op, name) for op, fitting in FITTING.items() for name, value in fitting().items() if type(value) is int]
BUDGET = ("index_select", "max_logits_bytes")  # any amount is one
CODES = ["cache_format", "num_threads", "isa"]  # of index_query_quant, behind the wrapper that would refuse them

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
    if kind in {ctypes.c_int32, ctypes.c_int64} and not name.endswith("_format")
    for value in attempts(op, name, kind)
]


def outcome_of_op(op: str, name: str, value: int) -> str:
    """The message of the refusal, or "taken"."""
    try:
        if name in CODES:
            arguments = FITTING["index_query_quant"]()
            codes = {"cache_format": 2, "num_threads": 0, "isa": 0} | {name: value}
            run_op("dsa_index_query_quant", arguments["query"], arguments["weights"], *codes.values())
        else:
            getattr(ops, op)(**{**FITTING[op](), name: value})
    except (ValueError, MemoryError) as error:
        return f"{type(error).__name__} {error}"
    return "taken"


def c_implementations() -> Iterator[CCpu]:
    """Those that this processor runs."""
    for name, make in implementations(C_LIBRARY).items():
        try:
            found = make() if name.startswith("c_") else None
        except Unavailable:
            continue
        if isinstance(found, CCpu):
            yield found


def report() -> None:
    """Make every attempt and print a line of JSON before and after it; run by the fixture in another process."""
    for op, name in [*ATTRIBUTES, BUDGET, *(("index_query_quant", name) for name in CODES)]:
        for value in INT64:
            print(json.dumps(["op", op, name, value, "killed the process"]), flush=True)
            print(json.dumps(["op", op, name, value, outcome_of_op(op, name, value)]), flush=True)
    for implementation in c_implementations():
        for op, name, value in SIZES:
            key = [implementation.name, op, name, value]
            print(json.dumps([*key, "killed the process"]), flush=True)
            print(json.dumps([*key, status_of(implementation, op, **{name: value})]), flush=True)


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[Any, ...], str]:
    """What became of each attempt; those behind a crash are missing."""
    command = [sys.executable, "-c", "from tests.ops.test_huge_sizes import report; report()"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert lines, done.stderr
    return {tuple(line[:-1]): line[-1] for line in lines}


@pytest.mark.parametrize("value", INT64)
@pytest.mark.parametrize(("op", "name"), [*ATTRIBUTES, *(("index_query_quant", name) for name in CODES)])
def test_a_huge_number_is_refused_by_name(
    outcomes: dict[tuple[Any, ...], str], op: str, name: str, value: int
) -> None:
    assert f"{name}: expected" in outcomes["op", op, name, value]
    assert f"got {value}" in outcomes["op", op, name, value]


@pytest.mark.parametrize("value", INT64)
def test_a_huge_budget_is_a_budget(outcomes: dict[tuple[Any, ...], str], value: int) -> None:
    assert (outcomes[("op", *BUDGET, value)] == "taken") == (value > 0)


@pytest.mark.parametrize(("op", "name"), sorted({(op, name) for op, name, _ in SIZES}))
def test_a_huge_field_is_a_bad_shape(
    outcomes: dict[tuple[Any, ...], str], c_implementation: CCpu, op: str, name: str
) -> None:
    tried = [value for at, field, value in SIZES if (at, field) == (op, name)]
    found = {value: outcomes.get((c_implementation.name, op, name, value), "not reached") for value in tried}
    is_budget = (op, name) == BUDGET
    assert found == {value: "DSA_OK" if is_budget and value > 0 else "DSA_BAD_SHAPE" for value in tried}


@pytest.mark.parametrize("op", OPS)
def test_no_number_of_threads_is_too_large(c_implementation: CCpu, op: str) -> None:
    assert status_of(c_implementation.on_threads((1 << 31) - 1), op) == "DSA_OK"


def test_a_max_length_beyond_the_block_table_needs_no_memory(c_implementation: CCpu) -> None:
    fields = fields_of(c_implementation, "index_select")
    capacity = fields["max_blocks"] * fields["block_size"]
    needed = {
        c_implementation.library.workspace_bytes(
            "index_select",
            c_implementation.params("index_select", **fields | {"max_length": max_length}),
            c_implementation.options(),
        )
        for max_length in (capacity, capacity + 1, (1 << 31) - 1)
    }
    assert len(needed) == 1
    c_implementation.call("index_select", GuardedMemory(), **fields | {"max_length": (1 << 31) - 1})


def test_a_layout_whose_bytes_exceed_int64_is_none(c_implementation: CCpu) -> None:
    library = c_implementation.library
    largest = (1 << 31) - 1
    assert library.call("dsa_index_block_bytes", library.headers.constants["DSA_FLOAT32"], largest, largest) == -1
    for name in ("DSA_FLOAT32", "DSA_BFLOAT16", "DSA_FP8"):
        row_bytes = library.call("dsa_latent_row_bytes", library.headers.constants[name], largest, largest)
        assert int(str(row_bytes)) > largest
