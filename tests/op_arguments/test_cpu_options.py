"""Options of the ops, and the codes and bounds that the ops share with the C headers."""

from __future__ import annotations

from typing import Any

import pytest

from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import (
    CACHE_FORMAT_CODES,
    ENTRY_KIND_CODES,
    ISA_CODES,
    MAX_THREADS,
    SCALE_FORMAT_CODES,
    CpuOptions,
)
from tests.kit.headers import Headers
from tests.kit.op_arguments import FITTING, call

pytestmark = pytest.mark.usefixtures("tensors_on_the_cpu")


def test_an_instruction_set_that_this_processor_lacks_is_refused() -> None:
    arguments = FITTING["index_query_quant"]()
    beyond = max(ISA_CODES.values()) + 1
    with pytest.raises(ValueError, match="index_query_quant: not supported on this device"):
        run_op("dsa_index_query_quant", arguments["query"], arguments["weights"], 2, 0, beyond)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(
            ({"num_threads": value}, f"num_threads: expected an int from 0 to 1024, got {value!r}")
            for value in (-1, 1025, 1 << 31, (1 << 32) + 1, 2.0, True, "2", None)
        ),
        ({"isa": "sse2"}, "isa: expected one of auto"),
        ({"isa": ["avx2"]}, r"isa: expected one of auto, .*got \['avx2'\]"),
        ({"isa": None}, "isa: expected one of auto, .*got None"),
    ],
)
def test_cpu_options_are_checked_once_when_they_are_made(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CpuOptions(**options)


@pytest.mark.parametrize("op", FITTING)
def test_options_of_another_type_are_refused(op: str) -> None:
    with pytest.raises(ValueError, match="cpu: expected CpuOptions, got int"):
        call(op, {**FITTING[op](), "cpu": 2})


@pytest.mark.parametrize(
    ("prefix", "codes"),
    [
        ("DSA_", CACHE_FORMAT_CODES),
        ("DSA_SCALE_", SCALE_FORMAT_CODES),
        ("DSA_ISA_", ISA_CODES),
        ("DSA_ENTRY_", ENTRY_KIND_CODES),
    ],
)
def test_codes_are_those_of_the_header(prefix: str, codes: dict[str, int]) -> None:
    constants = Headers().constants
    assert {name: constants[prefix + name.upper()] for name in codes} == dict(codes)


def test_the_bound_of_threads_is_that_of_the_header() -> None:
    assert Headers().constants["DSA_MAX_THREADS"] == MAX_THREADS
