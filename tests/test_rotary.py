"""Rotation tables and pairings against published check values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest

from fastdeploy_dsa.config import RopeConfig
from fastdeploy_dsa.rotary import RotaryTable, inverse_frequencies, rotate_halves, rotate_interleaved

PLAIN = RopeConfig(
    rope_type="default",
    theta=1e4,
    factor=1.0,
    original_max_position_embeddings=0,
    beta_fast=32.0,
    beta_slow=1.0,
    table_multiplier=1.0,
)
YARN_V32 = RopeConfig(
    rope_type="yarn",
    theta=1e4,
    factor=40.0,
    original_max_position_embeddings=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    table_multiplier=1.0,
)
ROTATIONS = [rotate_interleaved, rotate_halves]


def rotation_at(position: int, rope: RopeConfig = PLAIN, rotary_dim: int = 64) -> object:
    return RotaryTable(rope, rotary_dim).lookup(paddle.to_tensor([position], dtype="int32"), position + 1)


def test_yarn_frequencies_of_v32_have_the_published_values() -> None:
    f = inverse_frequencies(YARN_V32, 64)
    assert f[0] == 1.0
    expected = {
        10: 5.623413252e-2,
        11: 3.900692657e-2,
        16: 5.5e-3,
        22: 1.778279410e-4,
        23: 3.333803580e-5,
        31: 3.333803580e-6,
    }
    for pair, value in expected.items():
        assert f[pair] == pytest.approx(value, rel=1e-9)


def test_table_holds_angles_of_float64_at_long_positions() -> None:
    table = rotation_at(100_000, YARN_V32)
    angles = 100_000 * inverse_frequencies(YARN_V32, 64)
    assert np.abs(table.cos.numpy()[0] - np.cos(angles)).max() <= 2.0**-24  # type: ignore[attr-defined]
    at_5000 = rotation_at(5000, YARN_V32)
    assert at_5000.cos.numpy()[0, 16] == pytest.approx(-0.714886969, abs=1e-7)  # type: ignore[attr-defined]
    assert at_5000.sin.numpy()[0, 16] == pytest.approx(0.699240032, abs=1e-7)  # type: ignore[attr-defined]


def test_pairings_have_the_published_values_at_position_one() -> None:
    x, rotation = paddle.arange(64, dtype="float32").unsqueeze(0), rotation_at(1)
    halves, interleaved = rotate_halves(x, rotation).numpy()[0], rotate_interleaved(x, rotation).numpy()[0]
    for place, value in {0: -26.92707151, 1: -21.75976359, 32: 17.28967379, 63: 63.00413336}.items():
        assert halves[place] == pytest.approx(value, rel=1e-6)
    for place, value in {0: -0.84147098, 1: 0.54030231, 2: -0.58116210, 3: 3.55840563, 63: 63.00826727}.items():
        assert interleaved[place] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_dot_products_depend_on_the_distance_alone(rotate: object) -> None:
    rng = np.random.default_rng(3)
    q, k = (paddle.to_tensor(rng.standard_normal((1, 64)).astype(np.float32)) for _ in range(2))
    dots = [
        float((rotate(q, rotation_at(p + 5)) * rotate(k, rotation_at(p))).sum())  # type: ignore[operator]
        for p in (0, 1, 77, 1500)
    ]
    assert np.ptp(dots) <= 64 * np.finfo(np.float32).eps * float(q.norm() * k.norm())


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_heads_of_a_row_share_its_rotation(rotate: object) -> None:
    x = paddle.randn([3, 2, 64])
    rotation = RotaryTable(PLAIN, 64).lookup(paddle.to_tensor([4, 0, 2000], dtype="int32"), 2001)
    whole = rotate(x, rotation).numpy()  # type: ignore[operator]
    for head in range(2):
        assert np.array_equal(whole[:, head], rotate(x[:, head], rotation).numpy())  # type: ignore[operator]


def test_the_table_multiplier_scales_cos_and_sin() -> None:
    doubled = RopeConfig(**{**YARN_V32.__dict__, "table_multiplier": 2.0})
    assert np.array_equal(rotation_at(9, doubled).cos.numpy(), 2 * rotation_at(9, YARN_V32).cos.numpy())  # type: ignore[attr-defined]


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_rotating_a_slice_of_rows_of_odd_width_equals_rotating_its_copy(rotate: Callable[..., paddle.Tensor]) -> None:
    rows = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, 3, 13)).astype(np.float32))
    rotation = rotation_at(5, rotary_dim=6)
    sliced = rows[..., 7:]
    np.testing.assert_array_equal(rotate(sliced, rotation).numpy(), rotate(sliced.clone(), rotation).numpy())
