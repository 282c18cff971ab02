"""What the layers of a model with compressed entries need to know about a step, made once for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import paddle
from paddle import Tensor

from fastdeploy_dsa.compressed_cache_layout import WINDOW_BLOCK_TOKENS, WINDOW_POOL, CompressedSizes
from fastdeploy_dsa.ops import IndexSelection
from fastdeploy_dsa.step import StepMetadata

SELECTED_RATIO = 4  # layers of this ratio select entries; those of ratio 128 attend to all of them
LISTED_RATIO = 128
_LIST_MULTIPLE = 64  # lists of all entries are filled up to it, so that few widths occur


@dataclass(frozen=True, kw_only=True)
class CompressedStep(StepMetadata):
    """A step with its window rows and entries; padding rows see and write none.

    Attributes:
        window_mapping: [num_rows] int64, slot of the token's window row; -1 for padding.
        window_slots: [num_rows, width] int32, slots of the window that ends at the row's token, ascending by position,
            -1 behind them.
        window_counts: [num_rows] int32, slots that count.
        entry_mapping: By compression ratio, [num_rows] int64: slot of the entry whose window the row's token closes,
            or -1.
        entry_counts: By compression ratio, [num_rows] int32: entries that the row sees.
        all_entries: The entries of ratio 128 that every row sees; None if no row sees one. Never a selection of an
            indexer: layers that share one must not find it here (rule S24).
    """

    window_mapping: Tensor
    window_slots: Tensor
    window_counts: Tensor
    entry_mapping: Mapping[int, Tensor]
    entry_counts: Mapping[int, Tensor]
    all_entries: IndexSelection | None

    @classmethod
    def of(cls, step: StepMetadata, sizes: CompressedSizes, block_size: int) -> CompressedStep:
        """Derive the lists of a step (rules S19, S20, S24, S31).

        Args:
            step: Has a window table of the pool of window rows.
            sizes: Of the model.
            block_size: Tokens of a block of the main pool.
        """
        table = step.window_tables[WINDOW_POOL]
        width = min(sizes.sliding_window, step.max_length)
        first = paddle.clip(step.lengths - sizes.sliding_window, min=0)
        places = first.unsqueeze(1) + paddle.arange(width, dtype="int32")
        is_visible = places < step.lengths.unsqueeze(1)
        slots = _window_slots(table, step.request_ids.unsqueeze(1), places, is_visible)
        ratios = sorted({ratio for _, ratio in sizes.ratios if ratio > 1})
        return cls(
            **{field.name: getattr(step, field.name) for field in fields(StepMetadata)},
            window_mapping=_window_slots(table, step.request_ids, step.positions, step.lengths > 0).astype("int64"),
            window_slots=slots,
            window_counts=paddle.clip(step.lengths, max=sizes.sliding_window),
            entry_mapping={ratio: _entry_mapping(step, ratio, block_size) for ratio in ratios},
            entry_counts={ratio: step.lengths // ratio for ratio in ratios},
            all_entries=_all_entries(step, block_size) if LISTED_RATIO in ratios else None,
        )


def _gathered(table: Tensor, request_ids: Tensor, columns: Tensor) -> Tensor:
    """table[request_ids, columns] [R, C]; request_ids broadcast to columns."""
    places = (request_ids * table.shape[1] + columns).reshape([-1])
    return paddle.gather(table.reshape([-1]), places).reshape(columns.shape)


def _window_slots(table: Tensor, request_ids: Tensor, positions: Tensor, is_valid: Tensor) -> Tensor:
    """int32 slots of positions in the ring of window blocks; -1 where they are not valid or have no block."""
    blocks = _gathered(table, request_ids, positions // WINDOW_BLOCK_TOKENS % table.shape[1])
    slots = blocks * WINDOW_BLOCK_TOKENS + positions % WINDOW_BLOCK_TOKENS
    return paddle.where(is_valid & (blocks >= 0), slots, paddle.full_like(slots, -1))


def _entry_mapping(step: StepMetadata, ratio: int, block_size: int) -> Tensor:
    """Where the entry goes whose window the row's token closes; -1 where it closes none, and for padding."""
    block_entries = block_size // ratio
    blocks = _gathered(step.block_table, step.request_ids, step.positions // block_size)
    slots = blocks * block_entries + step.positions // ratio % block_entries
    closes = (step.lengths % ratio == 0) & (step.lengths > 0) & (blocks >= 0)
    return paddle.where(closes, slots, paddle.full_like(slots, -1)).astype("int64")


def _all_entries(step: StepMetadata, block_size: int) -> IndexSelection | None:
    """Every entry of ratio 128 that a row sees, ascending (rule S39)."""
    longest = step.max_length // LISTED_RATIO
    if longest == 0:
        return None
    block_entries = block_size // LISTED_RATIO
    last = longest - 1  # the filling behind looks at the last entry, whose block every table reaches
    entries = paddle.arange(longest + -longest % _LIST_MULTIPLE, dtype="int32").unsqueeze(0)
    reached = paddle.clip(entries, max=last).expand([step.num_rows, -1])
    counts = step.lengths // LISTED_RATIO
    blocks = _gathered(step.block_table, step.request_ids.unsqueeze(1), reached // block_entries)
    slots = blocks * block_entries + reached % block_entries
    is_seen = (entries < counts.unsqueeze(1)) & (blocks >= 0)
    nothing = paddle.full_like(slots, -1)
    numbers = paddle.where(is_seen, reached, nothing)
    return IndexSelection(numbers, paddle.where(is_seen, slots, nothing), counts)
