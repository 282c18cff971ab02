"""Every implementation of the ops by name, so that one test runs on all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from fastdeploy_dsa.ops.library import C_LIBRARY
from tests.kit.c_api import CCpu
from tests.kit.c_cuda import CCuda
from tests.kit.cuda_driver import NoDevice, driver
from tests.kit.headers import CLibrary
from tests.kit.implementation import Implementation, Unavailable
from tests.kit.paddle_ops import PaddleOps, paddle_module, paddle_ops

CPU_ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
GPU_NAMES = ("c_cuda", "paddle_gpu")  # of implementations that run on a GPU


def implementations(c_library: Path = C_LIBRARY) -> dict[str, Callable[[], Implementation]]:
    """Makers of every implementation by name; the levels that this processor lacks are left out.

    A maker raises Unavailable when the machine lacks the device or the framework.
    """
    makers: dict[str, Callable[[], Implementation]] = {}
    for isa in CPU_ISAS[: _best_isa(c_library)]:
        makers[f"c_cpu-{isa}"] = lambda isa=isa: CCpu(_library(c_library), isa)
    makers["paddle_cpu"] = _paddle_cpu
    makers["c_cuda"] = lambda: _c_cuda(c_library)
    makers["paddle_gpu"] = _paddle_gpu
    return makers


@cache
def _library(path: Path) -> CLibrary:
    return CLibrary(path)


def _best_isa(c_library: Path) -> int:
    """DSA_ISA_SCALAR = 1 and up; without a library all levels, whose tests then say that it is missing."""
    if not c_library.exists():
        return len(CPU_ISAS)
    return int(str(_library(c_library).call("dsa_cpu_isa")))


def _paddle_cpu() -> PaddleOps:
    paddle_ops()
    return PaddleOps()


def _c_cuda(c_library: Path) -> CCuda:
    library = _library(c_library)
    if not library.call("dsa_has_cuda"):
        raise Unavailable(f"{c_library.name} was built without CUDA kernels")
    try:
        driver()
    except NoDevice as reason:
        raise Unavailable(str(reason)) from reason
    return CCuda(library)


@cache
def _paddle_gpu() -> PaddleOps:
    if not C_LIBRARY.exists() or not _library(C_LIBRARY).call("dsa_has_cuda"):
        raise Unavailable("the Paddle ops were built without CUDA kernels")
    paddle = paddle_module()
    plugins = paddle.device.get_all_custom_device_type()
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        return PaddleOps(gpu=paddle.CUDAPlace(0))
    if plugins:  # of a device that is CUDA's; Paddle's CPU build can load one
        return PaddleOps(gpu=paddle.CustomPlace(plugins[0], 0))
    raise Unavailable("Paddle sees no GPU")
