"""Checks of what a user passes in; each raises one ValueError that names argument, expected and actual value."""

from __future__ import annotations

import math
import operator


def require_int(name: str, value: object, *, low: int, high: int | None = None, noun: str = "an int") -> int:
    """An integer (NumPy's too, a bool not) of low .. high, as int."""
    expected = f"{noun} of {low} or more" if high is None else f"{noun} of {low} to {high}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name}: expected {expected}, got {value!r}") from None
    if isinstance(value, bool) or number < low or (high is not None and number > high):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return number


def require_number(name: str, value: object, *, low: float, high: float, low_is_allowed: bool = True) -> float:
    """A finite number of low .. high (low itself only if low_is_allowed), as float."""
    interval = f"{'[' if low_is_allowed else '('}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    below = number < low if low_is_allowed else number <= low
    if isinstance(value, (bool, str, bytes)) or not math.isfinite(number) or below or number > high:
        raise ValueError(f"{name}: expected a number in {interval}, got {value!r}")
    return number


def require_bool(name: str, value: object) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return value
