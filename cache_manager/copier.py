"""How blocks are copied: the contract, and NumPy's way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

Blocks = Any  # a cache tensor of the framework [num_blocks, ...], or a host array [num_blocks, bytes_per_block] uint8
BlockIds = npt.NDArray[np.int64]


class CopyEvent(Protocol):
    """The end of a copy that was only started. Both methods raise if the copy failed."""

    def wait(self) -> None:
        """Make the compute that is given from now on wait for the copy; the caller need not wait."""

    def synchronize(self) -> None:
        """Return when the copy has ended."""


class BlockCopier(Protocol):
    """Copies whole blocks as bytes, between cache tensors and host arrays or inside one of them.

    The cache manager calls `copy` from the thread that schedules and from its own transfer thread.
    """

    def copy(self, *, src: Blocks, dst: Blocks, src_block_ids: BlockIds, dst_block_ids: BlockIds) -> CopyEvent | None:
        """Copy block src_block_ids[i] of src to block dst_block_ids[i] of dst, for every i; in any order.

        Args:
            src: Blocks of as many bytes as those of dst; may be dst.
            dst: Changed.
            src_block_ids: [n] int64.
            dst_block_ids: [n] int64, distinct, and none of them in src_block_ids if src is dst.

        Returns:
            None if the bytes are there now; else the event of their arrival.
        """

    def address(self, tensor: Blocks) -> int:
        """Where a cache tensor's bytes begin; changes if and only if the framework moves them."""

    def order_after_compute(self) -> None:
        """Make the copies that are started later wait for all that compute has been given so far."""


class NumpyCopier:
    """Copies between NumPy arrays; runs of consecutive blocks are one copy. Everything else may subclass it."""

    def copy(self, *, src: Blocks, dst: Blocks, src_block_ids: BlockIds, dst_block_ids: BlockIds) -> CopyEvent | None:
        """As BlockCopier.copy; done on return."""
        src_rows, dst_rows = self.byte_rows(src), self.byte_rows(dst)
        if src_rows.shape[1] != dst_rows.shape[1]:
            raise ValueError(f"dst: expected blocks of {src_rows.shape[1]} bytes, got {dst_rows.shape[1]}")
        for name, ids, rows in (("src", src_block_ids, src_rows), ("dst", dst_block_ids, dst_rows)):
            if len(ids) and not 0 <= ids.min() <= ids.max() < len(rows):
                raise ValueError(f"{name}_block_ids: expected 0 .. {len(rows) - 1}, got {ids.min()} .. {ids.max()}")
        for src_begin, dst_begin, count in consecutive_runs(src_block_ids, dst_block_ids):
            np.copyto(dst_rows[dst_begin : dst_begin + count], src_rows[src_begin : src_begin + count])
        return None

    def address(self, tensor: Blocks) -> int:
        """As BlockCopier.address."""
        return int(tensor.ctypes.data)

    def order_after_compute(self) -> None:
        """Nothing to wait for: NumPy computes at once."""

    @staticmethod
    def byte_rows(blocks: Blocks) -> npt.NDArray[np.uint8]:
        """[num_blocks, bytes_per_block] view of an array.

        Raises:
            ValueError: It is not contiguous, so that a view cannot exist.
        """
        array = cast("npt.NDArray[Any]", blocks)
        if not array.flags.c_contiguous:
            raise ValueError("blocks: expected a contiguous array")
        return array.reshape(-1).view(np.uint8).reshape(array.shape[0], -1)


def consecutive_runs(src_block_ids: BlockIds, dst_block_ids: BlockIds) -> Iterator[tuple[int, int, int]]:
    """(first source, first destination, count) of the runs that are consecutive on both sides."""
    if not len(src_block_ids):
        return
    steps = (np.diff(src_block_ids) != 1) | (np.diff(dst_block_ids) != 1)
    begins = np.concatenate(([0], np.flatnonzero(steps) + 1))
    counts = np.diff(np.concatenate((begins, [len(src_block_ids)])))
    yield from zip(src_block_ids[begins].tolist(), dst_block_ids[begins].tolist(), counts.tolist(), strict=True)
