"""bfloat16, e4m3 and power-of-two scales, exact to the bit.

Source: rules S24 and S25 of the DSA data flow; custom_ops/cpu/number_formats.h says the same in C.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float32Array = NDArray[np.float32]

E4M3_MAX = np.float32(448)
E4M3_NAN = 0x7F


def bf16_encode(values: ArrayLike) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 codes, half to even; NaN stays NaN, quiet and with its sign."""
    array = np.asarray(values, np.float32)
    bits = array.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def bf16_decode(codes: ArrayLike) -> Float32Array:
    """Float32 values of bfloat16 codes."""
    return (np.asarray(codes, np.uint16).astype(np.uint32) << 16).view(np.float32)


def bf16_round(values: ArrayLike) -> Float32Array:
    """Float32 values rounded to bfloat16."""
    return bf16_decode(bf16_encode(values))


def e4m3_encode(values: ArrayLike) -> NDArray[np.uint8]:
    """Round float32 to e4m3 codes, half to even, saturating at 448; NaN becomes 0x7F."""
    array = np.asarray(values, np.float32)
    magnitude = np.nan_to_num(np.minimum(np.abs(array), E4M3_MAX))
    # Codes are spaced 2^(exponent - 3) apart; below 2^-6 the spacing stays 2^-9.
    exponent = np.clip(np.where(magnitude > 0, np.frexp(magnitude)[1] - 1, -6), -6, 8)
    steps = np.rint(np.ldexp(magnitude, 3 - exponent)).astype(np.int64)
    # A normal number has 8 + mantissa steps: its hidden bit makes up for the exponent field being one lower. A step
    # count of 16 carries into the next exponent by itself.
    codes = ((exponent + 6) * 8 + steps) | np.where(np.signbit(array), 0x80, 0)
    return np.where(np.isnan(array), E4M3_NAN, codes).astype(np.uint8)


def e4m3_decode(codes: ArrayLike) -> Float32Array:
    """Float32 values of e4m3 codes; 0x7F and 0xFF are NaN."""
    code = np.asarray(codes, np.uint8).astype(np.int64)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude = np.where((code & 0x7F) == E4M3_NAN, np.nan, magnitude)
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)


def ceil_pow2(values: ArrayLike) -> Float32Array:
    """The smallest power of two >= each positive normal float32, exactly; 2^128 overflows to infinity."""
    array = np.asarray(values, np.float32)
    mantissa, exponent = np.frexp(array)
    power = np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))
    with np.errstate(over="ignore"):
        return np.where(np.isfinite(array), power, array).astype(np.float32)


def decode(array: NDArray[Any]) -> Float32Array:
    """Float32 values of an array of any format: uint8 is e4m3, uint16 is bfloat16, floats are cast."""
    if array.dtype == np.uint8:
        return e4m3_decode(array)
    if array.dtype == np.uint16:
        return bf16_decode(array)
    return array.astype(np.float32)


def encode_as(values: ArrayLike, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Float32 values in an unscaled format: uint16 is bfloat16, float32 is itself."""
    if dtype == np.uint16:
        return bf16_encode(values)
    if dtype == np.float32:
        return np.asarray(values, np.float32)
    raise ValueError(f"dtype: expected uint16 (bfloat16) or float32, got {dtype}")
