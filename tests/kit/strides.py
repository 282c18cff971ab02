"""Distances of an array's blocks and rows, as params structs want them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def block_stride(array: NDArray[Any]) -> int:
    """Bytes between two blocks."""
    # NumPy may say anything for a dimension of one.
    return array.strides[0] if len(array) > 1 else int(np.prod(array.shape[1:])) * array.itemsize


def row_stride(array: NDArray[Any]) -> int:
    """Numbers between two rows."""
    return block_stride(array) // array.itemsize
