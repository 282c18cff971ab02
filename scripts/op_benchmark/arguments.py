"""Arguments of cases as tensors, and the rows of a result that are checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from tests.kit.paddle_ops import PaddleOps

Arguments = dict[str, Any]

CHECKED_ROWS = 3  # the definition is slow: first, middle and last
PER_ROW = (
    *("query", "folded_weights", "request_ids", "lengths", "slot_ids", "counts"),
    *("window_slots", "window_counts", "entry_slots", "entry_counts"),
)


def tensors(arguments: Arguments) -> Arguments:
    """Arrays as Paddle tensors, other values as they are."""
    make = PaddleOps().tensor
    return {name: make(value) if isinstance(value, np.ndarray) else value for name, value in arguments.items()}


def checked_rows(num_rows: int) -> list[int]:
    """First, middle and last."""
    return sorted({0, num_rows // 2, num_rows - 1}) if num_rows > CHECKED_ROWS else list(range(num_rows))


def some_rows(arguments: Arguments, rows: list[int]) -> Arguments:
    """The arguments with some rows only."""
    kept = {name: arguments[name][rows] for name in PER_ROW if arguments.get(name) is not None}
    return arguments | kept


def arrays(result: Any) -> Any:
    """NumPy arrays of a tensor or of several."""
    return result.numpy() if isinstance(result, paddle.Tensor) else tuple(item.numpy() for item in result)
