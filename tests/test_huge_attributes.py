"""No number that a caller of the Paddle ops may pass overflows a product inside an op: it is refused by name.

A missing check would write somewhere in memory, so every attempt is made in one process of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from fastdeploy_dsa import ops
from fastdeploy_dsa.ops.library import run_op
from tests.kit.attempts import outcomes_of, print_outcomes
from tests.kit.op_arguments import FITTING
from tests.ops.test_huge_sizes import BUDGET, INT64

# type() instead of isinstance(): a switch is no number.
ATTRIBUTES = [(op, name) for op, fitting in FITTING.items() for name, value in fitting().items() if type(value) is int]
CODES = ["cache_format", "num_threads", "isa"]  # of index_query_quant, behind the wrapper that would refuse them


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


def report() -> None:
    """Make every attempt; run by the fixture in another process."""
    names = [*ATTRIBUTES, BUDGET, *(("index_query_quant", name) for name in CODES)]
    print_outcomes(
        ((op, name, value), partial(outcome_of_op, op, name, value)) for op, name in names for value in INT64
    )


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[Any, ...], str]:
    """What became of each attempt; those behind a crash are missing."""
    return outcomes_of(__name__)


@pytest.mark.parametrize("value", INT64)
@pytest.mark.parametrize(("op", "name"), [*ATTRIBUTES, *(("index_query_quant", name) for name in CODES)])
def test_a_huge_number_is_refused_by_name(
    outcomes: dict[tuple[Any, ...], str], op: str, name: str, value: int
) -> None:
    assert f"{name}: expected" in outcomes[op, name, value]
    assert f"got {value}" in outcomes[op, name, value]


@pytest.mark.parametrize("value", INT64)
def test_a_huge_budget_is_a_budget(outcomes: dict[tuple[Any, ...], str], value: int) -> None:
    assert (outcomes[(*BUDGET, value)] == "taken") == (value > 0)
