"""Memory that shows who read or wrote what they must not: poison in unread places, guard bytes around outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

POISON_BYTE = 0xFF  # NaN in e4m3, bfloat16 and float32
UNWRITTEN_INTEGER = 0x7B7B7B7B  # 0xFF would be the -1 that ends a selection
GUARD_BYTE = 0xC3
GUARD_BYTES = 256
ALIGNMENT = 64


def invalid_ids(limit: int, dtype: DTypeLike) -> list[int]:
    """Ids that lie outside [0, limit): the fixed list of every test."""
    extremes = np.iinfo(dtype)
    return [-1, int(extremes.min), limit, int(extremes.max)]


def fill_with_invalid_ids(array: NDArray[Any], where: NDArray[np.bool_], limit: int) -> None:
    """Put the invalid ids in turn wherever `where` says."""
    array[where] = np.resize(invalid_ids(limit, array.dtype), int(where.sum()))


def poisoned_memory(num_bytes: int) -> NDArray[np.uint8]:
    """Aligned poison with guard bytes before and behind."""
    raw = np.full(num_bytes + 2 * GUARD_BYTES + ALIGNMENT, GUARD_BYTE, np.uint8)
    first = GUARD_BYTES + (-(raw.ctypes.data + GUARD_BYTES)) % ALIGNMENT
    memory = raw[first : first + num_bytes]
    memory[:] = POISON_BYTE
    return memory


def poisoned_blocks(
    num_blocks: int, block_shape: Sequence[int], dtype: DTypeLike, *, gap_bytes: int = 0
) -> NDArray[Any]:
    """Poisoned blocks [num_blocks, *block_shape], gap_bytes apart."""
    block_bytes = int(np.prod(block_shape)) * np.dtype(dtype).itemsize
    stride = block_bytes + gap_bytes
    inner = np.empty(tuple(block_shape), dtype).strides
    memory = poisoned_memory(num_blocks * stride)
    return np.ndarray((num_blocks, *block_shape), dtype, memory, 0, (stride, *inner))


def whole_memory(view: NDArray[Any]) -> NDArray[np.uint8]:
    """Every byte of the allocation behind a view, gaps and guards included."""
    base: Any = view
    while base is not None:
        if isinstance(base, np.ndarray):
            view = base
        base = getattr(base, "base", None)  # NumPy puts an object of its own between a strided view and its array
    return view.reshape(-1).view(np.uint8)


def own_memory(view: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes from the first to the last number of a view; writable through the view only."""
    if view.size == 0:
        return np.empty(0, np.uint8)
    num_bytes = view.itemsize + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    whole = whole_memory(view)
    first = view.ctypes.data - whole.ctypes.data
    return whole[first : first + num_bytes]


def with_row_stride(array: NDArray[Any], *, padding: int = 8) -> NDArray[Any]:
    """The same numbers in a view whose first dimension is further apart; poison in between."""
    row = int(np.prod(array.shape[1:]))
    padded = np.full((array.shape[0], (row + padding) * array.itemsize), POISON_BYTE, np.uint8).view(array.dtype)
    view = padded[:, :row].reshape(array.shape) if array.ndim == 2 else _split_rows(padded[:, :row], array.shape)
    view[...] = array
    return view


def _split_rows(rows: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    inner = np.empty(shape[1:], rows.dtype).strides
    return np.lib.stride_tricks.as_strided(rows, shape, (rows.strides[0], *inner))


class GuardedMemory:
    """Outputs and workspaces of one call."""

    def __init__(self) -> None:
        self._memories: list[NDArray[np.uint8]] = []
        self._pads: list[NDArray[np.uint8]] = []

    def workspace(self, num_bytes: int) -> NDArray[np.uint8]:
        """Poisoned scratch memory."""
        memory = poisoned_memory(num_bytes)
        self._memories.append(memory)
        return memory

    def output(self, shape: Sequence[int], dtype: DTypeLike, *, row_padding: int = 0) -> NDArray[Any]:
        """An output [.., n] whose every number is poison; rows are row_padding numbers further apart."""
        kind = np.dtype(dtype)
        padded = (*shape[:-1], shape[-1] + row_padding)
        memory = self.workspace(int(np.prod(padded)) * kind.itemsize)
        array = memory.view(kind).reshape(padded)
        if kind == np.int32:
            array[...] = UNWRITTEN_INTEGER
        elif row_padding:
            self._pads.append(array[..., shape[-1] :])
        return array[..., : shape[-1]]

    def check(self) -> None:
        """Fail when a byte outside an output changed."""
        for memory in self._memories:
            whole = whole_memory(memory)
            first = memory.ctypes.data - whole.ctypes.data
            outside = np.concatenate([whole[:first], whole[first + memory.size :]])
            touched = np.flatnonzero(outside != GUARD_BYTE)
            assert not touched.size, (
                f"guard byte {touched[0]} of {first} in front was overwritten ({touched.size} in all)"
            )
        for pad in self._pads:
            left_alone = np.all(np.ascontiguousarray(pad).view(np.uint8) == POISON_BYTE)
            assert left_alone, "numbers between two rows of an output were overwritten"
