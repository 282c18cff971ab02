"""Rotary position embedding: the table and the two pairings."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from fastdeploy_dsa.config import RopeConfig

_FIRST_TABLE_ROWS = 1024


def inverse_frequencies(rope: RopeConfig, rotary_dim: int) -> npt.NDArray[np.float64]:
    """Angle per position of every pair, YaRN included.

    Returns:
        [rotary_dim / 2] float64.

    Source: YaRN (arXiv 2309.00071) as DeepSeek-V3 applies it; rules S13 and S14.
    """
    pair = np.arange(rotary_dim // 2, dtype=np.float64)
    extrapolated = rope.theta ** (-2.0 * pair / rotary_dim)
    if rope.rope_type != "yarn":
        return extrapolated
    low, high = _yarn_range(rope, rotary_dim)
    ramp = np.clip((pair - low) / (high - low), 0.0, 1.0)
    return extrapolated / rope.factor * ramp + extrapolated * (1.0 - ramp)


def _yarn_range(rope: RopeConfig, rotary_dim: int) -> tuple[float, float]:
    """First and last pair of the ramp between unchanged and interpolated frequencies."""

    def pair_with_turns(turns: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (turns * 2.0 * math.pi)
        return rotary_dim * math.log(wavelengths) / (2.0 * math.log(rope.theta))

    low = max(math.floor(pair_with_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(rope.beta_slow)), rotary_dim - 1)
    return float(low), high + 0.001 if low == high else float(high)


class Rotation(NamedTuple):
    """cos and sin of the rows of a step.

    Attributes:
        cos: [T, R / 2] float32.
        sin: [T, R / 2] float32.
        phase: [T, R / 2] complex64, cos + i sin.
    """

    cos: Tensor
    sin: Tensor
    phase: Tensor


class RotaryTable:
    """cos and sin of every position, float32 from float64 angles; grows with the longest context seen."""

    def __init__(self, rope: RopeConfig, rotary_dim: int) -> None:
        """Make a table for slices of rotary_dim numbers."""
        self._rope = rope
        self._frequencies = inverse_frequencies(rope, rotary_dim)
        self._cos, self._sin = self._rows(_FIRST_TABLE_ROWS)

    def lookup(self, positions: Tensor, max_length: int) -> Rotation:
        """The rows' rotation, times the table multiplier of the config (rule S15).

        Args:
            positions: [T] int32, below max_length.
            max_length: Host number that bounds the positions.
        """
        if max_length > self._cos.shape[0]:
            self._cos, self._sin = self._rows(1 << (max_length - 1).bit_length())
        cos, sin = paddle.gather(self._cos, positions), paddle.gather(self._sin, positions)
        return Rotation(cos, sin, paddle.complex(cos, sin))

    def _rows(self, count: int) -> tuple[Tensor, Tensor]:
        angles = np.arange(count, dtype=np.float64)[:, None] * self._frequencies[None, :]
        multiplier = self._rope.table_multiplier
        cos = (np.cos(angles) * multiplier).astype(np.float32)
        sin = (np.sin(angles) * multiplier).astype(np.float32)
        return paddle.to_tensor(cos), paddle.to_tensor(sin)


def rotate_interleaved(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate pairs (2i, 2i + 1), which stay where they are.

    Args:
        x: [T, R] or [T, heads, R] float32.
        rotation: Of the T rows.
    """
    # As complex numbers: the same products and sums as on strided halves, in a fifth of the time. as_complex reads a
    # view whose rows lie an odd number of floats apart from the wrong places, hence contiguous().
    pairs = paddle.as_complex(x.contiguous().reshape([*x.shape[:-1], x.shape[-1] // 2, 2]))
    return paddle.as_real(pairs * _broadcast(rotation.phase, x)).reshape(x.shape)


def rotate_last(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the last R numbers by interleaved pairs; the others stay.

    Args:
        x: [T, width] or [T, heads, width] float32, width >= R.
        rotation: Of the T rows.
    """
    kept = x.shape[-1] - 2 * rotation.cos.shape[-1]
    rotated = rotate_interleaved(x[..., kept:], rotation)
    return paddle.concat([x[..., :kept], rotated], axis=-1) if kept else rotated


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate pairs (i, i + R / 2).

    Args:
        x: [T, R] or [T, heads, R] float32.
        rotation: Of the T rows.
    """
    cos, sin = _broadcast(rotation.cos, x), _broadcast(rotation.sin, x)
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return paddle.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _broadcast(rows: Tensor, x: Tensor) -> Tensor:
    return rows if x.ndim == 2 else rows.unsqueeze(1)
