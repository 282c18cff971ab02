"""Windows and entries that rows see, and those that they should not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import paddle

from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.attention.deepseek_v4.step import LISTED_RATIO, SELECTED_RATIO, CompressedStep
from fastdeploy_dsa.ops import IndexSelection
from tests.kit.compressed_mistakes.planting import Mistake, Planting


def preparing(change: Callable[[Planting, CompressedStep], CompressedStep]) -> Mistake:
    """change(planting, step) in place of the step with its lists."""

    def plant(planting: Planting) -> None:
        right = DeepseekV4AttentionBackend.prepare
        planting.patch.setattr(
            DeepseekV4AttentionBackend, "prepare", lambda backend, step: change(planting, right(backend, step))
        )

    return plant


def seeing(count: Callable[[np.ndarray, int, np.ndarray], np.ndarray]) -> Mistake:
    """Every row sees count(positions, ratio, closed) entries; closed are those of the whole sequence."""

    def change(planting: Planting, step: CompressedStep) -> CompressedStep:
        lengths = step.lengths.numpy()
        position = lengths - 1
        counts = {}
        for ratio in step.entry_counts:
            wanted = count(position, ratio, np.array(planting.length // ratio))
            counts[ratio] = np.where(lengths > 0, np.maximum(wanted, 0), 0).astype(np.int32)
        return _with_counts(planting, step, counts)

    return preparing(change)


def _with_counts(planting: Planting, step: CompressedStep, counts: Mapping[int, np.ndarray]) -> CompressedStep:
    every = step.all_entries
    if LISTED_RATIO in counts and every is not None:
        block_entries = planting.serving.block_size // LISTED_RATIO
        numbers = np.arange(every.positions.shape[1])[None, :]
        blocks = planting.serving.block_table[0, np.minimum(numbers // block_entries, len(_row(planting)) - 1)]
        seen = numbers < counts[LISTED_RATIO][:, None]
        slots = np.where(seen, blocks * block_entries + numbers % block_entries, -1).astype(np.int32)
        every = IndexSelection(
            paddle.to_tensor(np.where(seen, numbers, -1).astype(np.int32)),
            paddle.to_tensor(slots),
            paddle.to_tensor(counts[LISTED_RATIO]),
        )
    tensors = {ratio: paddle.to_tensor(number) for ratio, number in counts.items()}
    return replace(step, entry_counts={**step.entry_counts, **tensors}, all_entries=every)


def _row(planting: Planting) -> np.ndarray:
    return planting.serving.block_table[0]


def window_of(change: int) -> Mistake:
    """The window is so much wider."""

    def plant(planting: Planting) -> None:
        sizes = planting.serving.backend.sizes
        wider = replace(sizes, sliding_window=sizes.sliding_window + change)
        planting.patch.setattr(planting.serving.backend, "sizes", wider)

    return plant


def without_listed_entries(planting: Planting, step: CompressedStep) -> CompressedStep:
    return replace(step, all_entries=None)


def without_selected_entries(planting: Planting) -> None:
    for attention in planting.attentions(SELECTED_RATIO):
        planting.patch.setattr(attention, "_entries", lambda step, selection: None)
