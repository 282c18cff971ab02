from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import paddle
import pytest

from fastdeploy_dsa import device
from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.attention.select import select_backend
from fastdeploy_dsa.config import ModelConfig
from fastdeploy_dsa.engine import LLM
from fastdeploy_dsa.engine.loading import CacheOptions, read_cache_dtype
from fastdeploy_dsa.installation import DEMO_MODEL


@pytest.fixture(autouse=True)
def paddle_device() -> Iterator[None]:
    """The device is a setting of the whole process."""
    before = paddle.get_device()
    yield
    paddle.set_device(before)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the ops had been built with CUDA."""
    monkeypatch.setattr(device, "has_gpu_kernels", lambda: True)


def test_the_cpu_needs_nothing() -> None:
    assert device.use_device("cpu") == "cpu"
    assert paddle.get_device() == "cpu"


def test_without_cuda_kernels_a_gpu_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu_kernels", lambda: False)
    with pytest.raises(ValueError, match=r"device: the ops were built without CUDA .*'gpu:0'.*FASTDEPLOY_DSA_CUDA=1"):
        device.use_device("gpu:0")
    with pytest.raises(ValueError, match="DSAAttentionBackend: the ops were built without CUDA kernels"):
        select_backend(ModelConfig.from_pretrained(DEMO_MODEL), "gpu:0")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["no-such-device", "gpu:99"])
def test_a_device_that_paddle_lacks_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"device: Paddle has no device '{name}' here \("):
        device.use_device(name)


@pytest.mark.parametrize("name", ["", None, 0])
def test_a_device_is_a_name(name: Any) -> None:
    with pytest.raises(ValueError, match="device: expected a name such as 'cpu' or 'gpu:0', got"):
        LLM(DEMO_MODEL, device=name)


@pytest.mark.usefixtures("kernels")
def test_with_cuda_kernels_the_same_backend_serves_a_gpu() -> None:
    assert select_backend(ModelConfig.from_pretrained(DEMO_MODEL), "gpu:0") is DSAAttentionBackend


def test_the_cache_dtype_follows_the_device() -> None:
    assert read_cache_dtype("auto", "cpu") == "float32"
    assert read_cache_dtype("auto", "gpu:0") == "fp8"
    assert read_cache_dtype("bfloat16", "gpu:0") == "bfloat16"


def test_swap_space_is_refused_where_nothing_copies() -> None:
    options = CacheOptions("fp8", 64, num_threads=0, device="gpu:0", num_blocks=8, host_bytes=1 << 20)
    with pytest.raises(ValueError, match="swap_space: expected 0 on device 'gpu:0', got 1048576 bytes"):
        options.choose_num_host_blocks(lambda count: 1024 * count)
