"""Two Triton kernels: a stand-in for vLLM's map from positions to slots, and a fetch of rows for the ceilings."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from scripts.gpu_benchmark import inputs


@triton.jit
def _slot_map(positions, table, slots, table_stride, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr):
    row = tl.program_id(0)
    place = tl.program_id(1) * tile + tl.arange(0, tile)
    position = tl.load(positions + row * width + place)
    found = tl.load(table + row * table_stride + tl.maximum(position, 0) // block)
    tl.store(slots + row * width + place, tl.where(position >= 0, found * block + position % block, -1))


def slot_map(positions: Tensor, table: Tensor, slots: Tensor) -> None:
    """Positions [rows, TOPK] through table [rows, blocks]."""
    grid = (positions.shape[0], inputs.TOPK // 512)
    _slot_map[grid](positions, table, slots, table.stride(0), inputs.TOPK, inputs.BLOCK, 512, num_warps=4)


@triton.jit
def _row_sums(source, ids, out, rows: tl.constexpr):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    first = tl.load(ids + row) * 82
    word = tl.arange(0, 128)
    values = tl.load(source + first[:, None] + word[None, :], mask=word[None, :] < 82, other=0)
    tl.store(out + row, tl.sum(values, 1))


def row_sums(source: Tensor, ids: Tensor, out: Tensor, rows: int) -> None:
    """Fetch rows of 82 int64 (656 bytes), `rows` of them a program."""
    _row_sums[(ids.numel() // rows,)](source, ids, out, rows, num_warps=4)
