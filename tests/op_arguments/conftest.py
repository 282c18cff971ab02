"""Fixtures of the ops' tests."""

from __future__ import annotations

from collections.abc import Iterator

import paddle
import pytest


@pytest.fixture
def tensors_on_the_cpu() -> Iterator[None]:
    """Where values inside tensors are refused, too; a Paddle with a GPU would put tensors there."""
    device = paddle.get_device()
    paddle.set_device("cpu")
    yield
    paddle.set_device(device)
