"""Models and devices of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import paddle
import pytest

from fastdeploy_dsa.device import use_device
from tests.kit.byte_tokenizer import save_byte_tokenizer
from tests.kit.paddle_ops import PaddleOps
from tests.kit.tiny_model import write_tiny_model

FALLBACK = "FLAGS_enable_api_kernel_fallback"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a tokenizer."""
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def gpu(paddle_gpu_implementation: PaddleOps) -> Iterator[str]:
    """Paddle's name of the GPU, which is the current device meanwhile."""
    place = paddle_gpu_implementation.gpu
    name = place.get_device_type() if isinstance(place, paddle.CustomPlace) else "gpu"
    before = paddle.get_device()
    yield use_device(f"{name}:0")
    paddle.device.set_device(before)


@pytest.fixture
def falls_back() -> Iterator[None]:
    """A plugin may lack kernels of Paddle's own ops, which then run on the CPU."""
    before = paddle.get_flags(FALLBACK)
    paddle.set_flags({FALLBACK: True})
    yield
    paddle.set_flags(before)
