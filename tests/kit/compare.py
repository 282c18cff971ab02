"""Comparisons that a NaN cannot pass and that say where the first difference is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# A bound above this share of the expected numbers' size would accept a wrong kernel.
LOOSEST_BOUND = 2.0**-6


class MeaninglessBound(Exception):
    """A tolerance so loose that passing it says nothing."""


def assert_same(actual: NDArray[Any], expected: NDArray[Any], what: str, *, mask: ArrayLike | None = None) -> None:
    """Equal shape, dtype and bits; mask says where."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    differs = _bits(actual) != _bits(expected)
    if mask is not None:
        differs &= np.asarray(mask)
    _fail_at_first(differs, actual, expected, what)


def assert_close(
    actual: NDArray[Any], expected: NDArray[Any], bound: NDArray[Any], what: str, *, loosest: float = LOOSEST_BOUND
) -> None:
    """NaN and infinities in the same places, every other number within its bound.

    Args:
        actual: Numbers of an implementation.
        expected: Numbers of the definition.
        bound: Largest error of each.
        what: Name for the message.
        loosest: Largest share of the expected numbers' size that the bounds may have.

    Raises:
        MeaninglessBound: The bound is a large share of the numbers themselves.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    for name, is_anomaly in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        _fail_at_first(is_anomaly(actual) != is_anomaly(expected), actual, expected, f"{what} ({name})")
    finite = np.isfinite(expected)
    if not finite.any():
        return
    _require_meaning(expected[finite], np.broadcast_to(bound, expected.shape)[finite], what, loosest)
    error = np.zeros(expected.shape)
    error[finite] = np.abs(actual[finite].astype(np.float64) - expected[finite])
    within = error <= bound
    _fail_at_first(~within & finite, actual, expected, f"{what} (bound {np.max(bound[finite]):.3g} at most)")


def relative_square_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """sum (a - b)^2 / sum (a^2 + b^2) over finite numbers; rule S74."""
    finite = np.isfinite(expected)
    a, b = actual[finite].astype(np.float64), expected[finite].astype(np.float64)
    total = float(np.sum(a * a + b * b))
    return float(np.sum((a - b) ** 2)) / total if total else 0.0


def assert_selects_best(
    positions: NDArray[np.int32], logits: NDArray[np.float64], bound: NDArray[np.float64], length: int, what: str
) -> None:
    """A selected row differs from the exact one only among scores that the bound cannot tell apart.

    Args:
        positions: [topk] int32, one row.
        logits: [width] float64, exact scores of the row.
        bound: [width] float64, error of each score.
        length: Visible keys.
        what: Name for the message.
    """
    topk = len(positions)
    count = min(topk, max(length, 0))
    assert np.all(positions[count:] == -1), f"{what}: the tail is {positions[count:]}, expected -1"
    selected = positions[:count]
    assert np.all(np.diff(selected) > 0), f"{what}: positions do not ascend: {selected}"
    if not count:
        return
    assert selected[0] >= 0, f"{what}: first position is {selected[0]}, expected 0 or more"
    assert selected[-1] < length, f"{what}: last position is {selected[-1]}, expected less than {length}"
    left_out = np.setdiff1d(np.arange(length), selected)
    if not left_out.size:
        return
    worst = selected[np.argmin(logits[selected] + bound[selected])]
    best = left_out[np.argmax(logits[left_out] - bound[left_out])]
    assert not logits[best] - bound[best] > logits[worst] + bound[worst], (
        f"{what}: position {worst} with score {logits[worst]} was selected instead of {best} with {logits[best]}"
    )


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    return np.ascontiguousarray(array).view(kinds[array.itemsize])


def _require_meaning(expected: NDArray[Any], bound: NDArray[Any], what: str, loosest: float) -> None:
    size, loose = np.sqrt(np.mean(expected**2)), np.sqrt(np.mean(bound**2))
    if not loose <= loosest * size and size > 0:
        raise MeaninglessBound(f"{what}: bound {loose:.3g} for numbers of size {size:.3g}")


def _fail_at_first(differs: NDArray[np.bool_], actual: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    if not differs.any():
        return
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(differs)), differs.shape))
    raise AssertionError(
        f"{what}: {int(differs.sum())} of {differs.size} differ, first at {where}: "
        f"got {actual[where]!r}, expected {expected[where]!r}"
    )
