"""Numbers of bytes as people write them."""

from __future__ import annotations

import operator
import re
from fractions import Fraction

from fastdeploy_dsa.wording import shown

_MOST_BYTES = 1 << 60  # more than any machine has: a wrong digit or unit
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}


def read_bytes(name: str, value: object, *, low: int = 1) -> int:
    """A number of bytes: an int, or text such as "512MiB" or "80 GB".

    Raises:
        ValueError: It is neither, below low, or more than 2^60.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", value, re.ASCII)
        if match is None or match[2] not in _UNITS:
            raise ValueError(f"{name}: expected bytes, such as 1048576 or '512MiB', got {shown(value)}")
        value = int(Fraction(match[1]) * _UNITS[match[2]])
    try:
        num_bytes = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        num_bytes = -1
    if isinstance(value, bool) or num_bytes < low:
        raise ValueError(f"{name}: expected an int of {low} or more, got {shown(value)}")
    if num_bytes > _MOST_BYTES:
        raise ValueError(f"{name}: expected at most {_MOST_BYTES} bytes, got {shown(value)}")
    return num_bytes


def written_bytes(num_bytes: float) -> str:
    """In the largest unit of which there is at least one, to four digits; exact below 1 KiB."""
    for power, prefix in reversed(list(enumerate("KMGT", 1))):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.4g} {prefix}iB"
    return f"{num_bytes:g} B"
