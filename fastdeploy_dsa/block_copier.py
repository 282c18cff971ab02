"""Copies blocks of Paddle's cache tensors for the cache manager."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor

from cache_manager import BlockIds, CopyEvent
from fastdeploy_dsa.ops import CpuOptions, block_copy
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS

HostArray = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class PaddleBlockCopier:
    """The cache manager's BlockCopier over Paddle tensors on the CPU and host arrays; no byte is copied twice."""

    def __init__(self, cpu: CpuOptions = DEFAULT_CPU_OPTIONS) -> None:
        """Keep how to run the copies."""
        self._cpu = cpu

    def copy(
        self, *, src: Tensor | HostArray, dst: Tensor | HostArray, src_block_ids: BlockIds, dst_block_ids: BlockIds
    ) -> CopyEvent | None:
        """As BlockCopier.copy; done on return."""
        src_rows = byte_rows(src)
        block_copy(
            src=src_rows,
            dst=src_rows if dst is src else byte_rows(dst),
            src_block_ids=paddle.to_tensor(src_block_ids),
            dst_block_ids=paddle.to_tensor(dst_block_ids),
            cpu=self._cpu,
        )
        return None

    def address(self, tensor: Tensor) -> int:
        """As BlockCopier.address."""
        return int(tensor.data_ptr())

    def order_after_compute(self) -> None:
        """Nothing to wait for: Paddle's CPU ops are done when they return."""


def byte_rows(blocks: Tensor | HostArray) -> Tensor:
    """[num_blocks, bytes_per_block] uint8 view of a cache tensor or a host array, on the same memory.

    Raises:
        ValueError: It is not contiguous, so that a view cannot exist.
    """
    if isinstance(blocks, np.ndarray):
        if not blocks.flags.c_contiguous:
            raise ValueError(f"blocks: expected a contiguous array, got strides {blocks.strides}")
        rows: Tensor = paddle.utils.dlpack.from_dlpack(blocks)
    else:
        if not blocks.is_contiguous():
            raise ValueError(f"blocks: expected a contiguous tensor, got strides {blocks.strides}")
        rows = blocks if blocks.dtype == paddle.uint8 else paddle.view(blocks, "uint8")
    return rows.reshape([rows.shape[0], -1])
