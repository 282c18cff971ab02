"""Page-locked host memory and copies to it, by FastDeploy's operators; on the CPU this package's own."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from cache_manager import BlockCopier, BlockIds, CopyEvent, HostAllocator
from fastdeploy_dsa.block_copier import PaddleBlockCopier
from fastdeploy_dsa.device import CPU
from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError

TO_HOST, TO_DEVICE = 0, 1  # the last argument of FastDeploy's swap operators
WORD_BYTES = 8  # their kernel moves whole words and leaves a remainder behind
NUMA_PREFIX = "NUMA IDs of closest CPU:"


class PinnedAllocator:
    """A HostAllocator over FastDeploy's cuda_host_alloc and cuda_host_free."""

    def __init__(self) -> None:
        """Look the operators up.

        Raises:
            PluginError: One of them is not built: memory could not be given back.
        """
        from fastdeploy.cache_manager import ops

        allocate, free = getattr(ops, "cuda_host_alloc", None), getattr(ops, "cuda_host_free", None)
        if allocate is None or free is None:
            raise PluginError(
                "--swap-space needs FastDeploy's cuda_host_alloc and cuda_host_free, which are not built here"
            )
        self._allocate, self._free = allocate, free
        self._addresses: dict[int, int] = {}

    def allocate(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """As HostAllocator.allocate; cudaHostAlloc returns whole pages."""
        address = int(self._allocate(num_bytes))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
        self._addresses[memory.ctypes.data] = address
        return memory

    def free(self, memory: npt.NDArray[np.uint8]) -> None:
        """As HostAllocator.free."""
        self._free(self._addresses.pop(memory.ctypes.data))


class SwapOpCopier:
    """A BlockCopier over FastDeploy's swap operators, which run on Paddle's stream and return when they are done.

    On that stream a copy comes after all compute that was given before, and before all that is given later.
    """

    def __init__(self, device_id: int) -> None:
        """Keep the device for the operators."""
        self._device_id = device_id

    def copy(self, *, src: Any, dst: Any, src_block_ids: BlockIds, dst_block_ids: BlockIds) -> CopyEvent | None:
        """As BlockCopier.copy; one side is a host array, or both are the same kind of device tensor."""
        from fastdeploy.cache_manager import ops

        if not isinstance(src, np.ndarray) and not isinstance(dst, np.ndarray):
            return PaddleBlockCopier().copy(src=src, dst=dst, src_block_ids=src_block_ids, dst_block_ids=dst_block_ids)
        to_host = isinstance(dst, np.ndarray)
        tensor, host = (src, dst) if to_host else (dst, src)
        if host.shape[1] % WORD_BYTES:
            raise PluginError(f"host cache: expected blocks of a multiple of {WORD_BYTES} bytes, got {host.shape[1]}")
        device_ids, host_ids = (src_block_ids, dst_block_ids) if to_host else (dst_block_ids, src_block_ids)
        ops.swap_cache_per_layer(
            tensor if tensor.dtype == paddle.uint8 else paddle.view(tensor, "uint8"),
            host.ctypes.data,
            host.shape[0],
            device_ids.tolist(),
            host_ids.tolist(),
            self._device_id,
            TO_HOST if to_host else TO_DEVICE,
        )
        return None

    def address(self, tensor: Any) -> int:
        """As BlockCopier.address."""
        return int(tensor.data_ptr())

    def order_after_compute(self) -> None:
        """Nothing to do: the operators and the compute share a stream."""


def copier_for(device: str, device_id: int) -> BlockCopier:
    """The copier of Paddle's device."""
    return PaddleBlockCopier() if device == CPU else SwapOpCopier(device_id)


def allocator_for(device: str, num_host_blocks: int) -> HostAllocator | None:
    """Page-locked memory on a GPU; None: plain memory.

    Raises:
        PluginError: Host blocks are asked for, and FastDeploy cannot allocate them: before anything is allocated.
    """
    return None if device == CPU or num_host_blocks == 0 else PinnedAllocator()


def numa_node_of_gpu(device_id: int) -> int:
    """The NUMA node next to a GPU; -1 if nobody knows."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "topo", "-C", "-i", str(device_id)],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
        line = asked.stdout.strip()
        if asked.returncode == 0 and line.startswith(NUMA_PREFIX):
            return int(line.removeprefix(NUMA_PREFIX).split(",")[0].split("-")[0])
    except Exception as reason:  # noqa: BLE001 - a host cache far from the GPU is slow, but right
        logging.getLogger(__name__).debug("no NUMA node of GPU %d: %s", device_id, reason)
    return -1


def bind_to_numa_node(node: int) -> bool:
    """Let this thread run, and its memory lie, on a NUMA node; False where that cannot be."""
    try:
        library = ctypes.CDLL("libnuma.so.1")
    except OSError:
        return False
    if node < 0 or library.numa_available() < 0 or library.numa_run_on_node(node) < 0:
        return False
    library.numa_set_preferred(node)
    return True
