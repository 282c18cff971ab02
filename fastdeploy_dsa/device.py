"""Which device the engine computes on, and whether the ops have kernels for it."""

from __future__ import annotations

import ctypes
from functools import cache

from fastdeploy_dsa.ops.library import C_LIBRARY

CPU = "cpu"


@cache
def has_gpu_kernels() -> bool:
    """Whether the op libraries contain CUDA kernels; both are linked from the same objects."""
    return C_LIBRARY.exists() and bool(ctypes.CDLL(str(C_LIBRARY)).dsa_has_cuda())


def refusal(device: str) -> str:
    """Why the ops cannot run on a device by Paddle's name for it ("cpu", "gpu", "gpu:1"); empty if they can."""
    if device == CPU or has_gpu_kernels():
        return ""
    return (
        f"the ops were built without CUDA kernels, got device {device!r}; they are built where nvcc is and "
        "Paddle is a CUDA build, or FASTDEPLOY_DSA_CUDA=1 is set"
    )


def use_device(device: object) -> str:
    """Let Paddle create its tensors on a device from now on, for the whole process.

    Args:
        device: Paddle's name: "cpu", "gpu", "gpu:1", or that of a device plugin.

    Returns:
        The name.

    Raises:
        ValueError: Paddle does not have the device, or the ops have no kernels for it.
    """
    import paddle  # noqa: PLC0415 - the command line answers --help without it

    if not isinstance(device, str) or not device:
        raise ValueError(f"device: expected a name such as 'cpu' or 'gpu:0', got {device!r}")
    reason = refusal(device)
    if reason:
        raise ValueError(f"device: {reason}")
    try:
        paddle.device.set_device(device)
    except (ValueError, RuntimeError, OSError) as error:
        said = str(error).strip().splitlines()[-1]
        raise ValueError(f"device: Paddle has no device {device!r} here ({said})") from None
    return device
