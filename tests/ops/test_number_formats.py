"""The formats of the reference against independent definitions, and every implementation against the reference."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastdeploy_dsa.ops.reference import (
    bf16_decode,
    bf16_encode,
    ceil_pow2,
    e4m3_decode,
    e4m3_encode,
    index_key_write,
)
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation

FINITE_CODES = [code for code in range(256) if code & 0x7F != 0x7F]


def probes_around(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each value, the middles between neighbours, and the floats next to all of these."""
    ordered = np.unique(values)
    points = np.concatenate([ordered, (ordered[1:].astype(np.float64) + ordered[:-1]).astype(np.float64) / 2])
    points = points.astype(np.float32)
    infinity = np.float32(np.inf)
    return np.concatenate([points, np.nextafter(points, infinity), np.nextafter(points, -infinity)])


def nearest_even_code(value: float, values: dict[int, Fraction]) -> int:
    """The code whose value is nearest, the even one of two: exact rational arithmetic."""
    target = Fraction(value)
    return min(values, key=lambda code: (abs(values[code] - target), code & 1))


def test_e4m3_documented_codes() -> None:
    values = [448, 500, 1, 240, -0.5, 2.0**-9, 2.0**-10, 0, 17, 19, -0.0, np.inf, -np.inf, np.nan]
    codes = [0x7E, 0x7E, 0x38, 0x77, 0xB0, 0x01, 0x00, 0x00, 0x58, 0x5A, 0x80, 0x7E, 0xFE, 0x7F]
    assert e4m3_encode(values).tolist() == codes


def test_e4m3_decoding_and_encoding_returns_every_code() -> None:
    assert e4m3_encode(e4m3_decode(FINITE_CODES)).tolist() == FINITE_CODES
    assert np.isnan(e4m3_decode([0x7F, 0xFF])).all()


def test_e4m3_rounds_to_the_nearest_value_and_ties_to_the_even_code() -> None:
    positive = {code: Fraction(float(e4m3_decode(code))) for code in range(0x7F)}
    probes = probes_around(e4m3_decode(FINITE_CODES))
    probes = np.unique(np.abs(probes[np.abs(probes) < 448]))
    assert e4m3_encode(probes).tolist() == [nearest_even_code(float(probe), positive) for probe in probes]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.floats(width=32, allow_nan=False, min_value=-500, max_value=500))
def test_e4m3_error_is_at_most_half_a_step(value: float) -> None:
    decoded = float(e4m3_decode(e4m3_encode(value)))
    clipped = min(max(value, -448.0), 448.0)
    step = max(2.0**-9, 2.0 ** (np.floor(np.log2(abs(clipped))) - 3)) if clipped else 2.0**-9
    assert not abs(decoded - clipped) > step / 2
    assert np.signbit(decoded) == np.signbit(value)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_is_one_of_the_two_neighbours_and_the_nearer(value: float) -> None:
    code = int(bf16_encode(value))
    exact = Fraction(value)
    below = bf16_decode(np.uint16(int(np.float32(value).view(np.uint32)) >> 16))
    above = bf16_decode(np.uint16((int(np.float32(value).view(np.uint32)) >> 16) + 1))
    if not np.isfinite(above):
        return
    gaps = {int(bf16_encode(side)): abs(Fraction(float(side)) - exact) for side in (below, above)}
    assert code == min(gaps, key=lambda c: (gaps[c], c & 1))


def test_bf16_keeps_infinities_and_quiets_nan_with_its_sign() -> None:
    values = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000, 0x7F7FFFFF], np.uint32).view(np.float32)
    assert bf16_encode(values).tolist() == [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F80]


def test_bf16_decoding_and_encoding_returns_every_code_that_is_not_a_signalling_nan() -> None:
    codes = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    quiet = np.where(np.isnan(bf16_decode(codes)), codes | 0x40, codes)
    assert_same(bf16_encode(bf16_decode(codes)), quiet, "codes")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.floats(width=32, min_value=2.0**-126, max_value=2.0**127))
def test_ceil_pow2_is_the_smallest_power_of_two_not_below(value: float) -> None:
    power = float(ceil_pow2(value))
    assert np.frexp(power)[0] == 0.5
    assert power >= value > power / 2


def test_ceil_pow2_of_a_power_of_two_is_itself() -> None:
    powers = np.ldexp(1.0, np.arange(-126, 128)).astype(np.float32)
    assert_same(ceil_pow2(powers), powers, "powers")
    assert ceil_pow2(1.0000001) == 2


def quantised(implementation: Implementation, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """e4m3 codes of values that are bfloat16 numbers up to 448, through a query whose scale is exactly 1."""
    dims = 16
    rows = np.full((-(-len(values) // (dims - 1)), dims), 448, np.float32)
    spread = np.zeros(rows.shape[0] * (dims - 1), np.float32)
    spread[: len(values)] = values
    rows[:, 1:] = spread.reshape(-1, dims - 1)
    codes, _ = implementation.index_query_quant(
        query=rows[:, None], weights=np.ones((len(rows), 1), np.float32), cache_format="fp8"
    )
    return codes[:, 0, 1:].reshape(-1)[: len(values)]


def test_every_bf16_number_up_to_448_has_the_e4m3_code_of_the_definition(implementation: Implementation) -> None:
    every = bf16_decode(np.arange(65536, dtype=np.uint32).astype(np.uint16))
    values = every[np.abs(every) <= 448]
    codes = quantised(implementation, values)
    assert_same(codes, e4m3_encode(values), "codes")


def rounded_to_bf16(implementation: Implementation, values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 codes of values, through a query that is not quantised."""
    codes, _ = implementation.index_query_quant(
        query=values.reshape(-1, 1, 37), weights=np.ones((values.size // 37, 1), np.float32), cache_format="bfloat16"
    )
    return codes.reshape(-1)


def test_bf16_ties_denormals_nan_and_infinities_have_the_codes_of_the_definition(
    implementation: Implementation,
) -> None:
    rng = np.random.default_rng(5)
    high = np.repeat(np.arange(0, 65536, 11, dtype=np.uint32), 5) << 16
    low = np.tile(np.array([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001], np.uint32), len(high) // 5)
    random_bits = rng.integers(0, 2**32, 3000, dtype=np.uint64).astype(np.uint32)
    bits = np.concatenate([high | low, random_bits])
    values = bits[: len(bits) // 37 * 37].view(np.float32)
    codes = rounded_to_bf16(implementation, values)
    assert_same(codes, bf16_encode(values), "codes")


@pytest.mark.parametrize("scale_format", ["ue8m0", "plain"])
def test_scales_of_every_size_are_those_of_the_definition(implementation: Implementation, scale_format: str) -> None:
    exponents = np.arange(-130, 127)
    sizes = np.ldexp(np.float32(1), exponents)
    key = np.stack([sizes * np.float32(factor) for factor in (1, 0.875, 1.75, 1.0078125)], -1).reshape(-1, 1)
    actual = np.full((len(key) // 4 + 1, 4, 5), 0xFF, np.uint8)
    expected = actual.copy()
    arguments: dict[str, Any] = {"key": key, "slot_mapping": np.arange(len(key)), "scale_format": scale_format}
    implementation.index_key_write(cache=actual, **arguments)
    index_key_write(cache=expected, **arguments)
    assert_same(actual, expected, "cache")
