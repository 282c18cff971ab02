"""Weights as DeepSeek-V4 is released: fp8 and fp4 numbers with power-of-two scales beside them, and integer tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.models.checkpoint import CheckpointError
from tests.kit.safetensors_files import Stored, e4m3, e4m3_value, f32, load, write_single


def powers(exponents: Any) -> Stored:
    codes = np.asarray(exponents) + 127
    return Stored("F8_E8M0", codes.shape, codes.astype(np.uint8).tobytes())


def test_fp8_weights_with_power_of_two_scales_beside_them(tmp_path: Path) -> None:
    codes = np.arange(6).reshape(2, 3) + 0x38  # 1, 1.125, ...
    stored = {"a.weight": e4m3(codes), "a.scale": powers([[1, -2]])}
    loaded = load(write_single(tmp_path, stored), {"a.weight": (2, 3)}, weight_block_size=(2, 2))
    expected = np.array([[e4m3_value(code) for code in row] for row in codes]) * [2.0, 2.0, 0.25]
    assert np.array_equal(loaded["a.weight"], expected.astype(np.float32))


def test_fp4_weights_are_unpacked_low_bits_first_with_a_scale_per_32_numbers(tmp_path: Path) -> None:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    codes = np.random.default_rng(3).integers(0, 16, (3, 64))
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    exponents = np.array([[0, 1], [-3, 2], [5, -1]])
    stored = {"a.weight": Stored("I8", packed.shape, packed.tobytes()), "a.scale": powers(exponents)}
    loaded = load(write_single(tmp_path, stored), {"a.weight": (3, 64)})
    expected = np.take(values, codes) * np.repeat(2.0**exponents, 32, axis=1)
    assert np.array_equal(loaded["a.weight"], expected.astype(np.float32))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"a.weight": Stored("I8", (1, 16), bytes(16))}, "dtype I8, but the tensor with its scales is missing"),
        (
            {"a.weight": Stored("I8", (1, 16), bytes(16)), "a.scale": powers([[0, 0]])},
            r"a.scale: expected shape \(1, 1\), got \(1, 2\)",
        ),
        (
            {"a.weight": Stored("I8", (1, 16), bytes(16)), "a.scale": powers([[128]])},
            r"a.scale: nan at \(0, 0\), expected finite numbers",
        ),
        ({"a.weight": f32(np.ones((1, 32))), "a.scale": powers([[0]])}, "a.scale: scales a tensor of dtype F32"),
        ({"a.scale": powers([[0]])}, "a.scale: there is no tensor a.weight that it scales"),
    ],
)
def test_packed_weights_that_cannot_be_used_are_named(tmp_path: Path, stored: dict[str, Stored], message: str) -> None:
    shapes = {"a.weight": (1, 32)} if "a.weight" in stored else {}
    with pytest.raises(CheckpointError, match=message):
        load(write_single(tmp_path, stored), shapes)


def test_tables_of_integers_are_read_as_such(tmp_path: Path) -> None:
    table = np.array([[3, 1 << 40], [-7, 0]])
    folder = write_single(tmp_path, {"t": Stored("I64", table.shape, table.astype("<i8").tobytes())})
    loaded = load(folder, {"t": (2, 2)}, integers={"t"})
    assert loaded["t"].dtype == np.int64
    assert np.array_equal(loaded["t"], table)
    with pytest.raises(CheckpointError, match="t: expected dtype I64, I32, got F32"):
        load(write_single(tmp_path, {"t": f32([[1.0]])}), {"t": (1, 1)}, integers={"t"})
