"""Selections of one request as masks, and forced upon a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fastdeploy_dsa.models  # before the indexer, which it imports and which imports its layers

# isort: split
import numpy as np
import paddle
import pytest

import fastdeploy_dsa.indexer
from fastdeploy_dsa.ops import IndexSelection


def token_slots(block_table: Any, block_size: int, length: int) -> np.ndarray:
    """[length] slots of the only request's tokens."""
    position = np.arange(length)
    return block_table.numpy()[0, position // block_size].astype(np.int64) * block_size + position % block_size


def selection_of(mask: np.ndarray, slots: np.ndarray, num_rows: int) -> IndexSelection:
    """A [T, T] mask as the ops hand it over, with rows of padding behind."""
    counts = np.zeros(num_rows, np.int32)
    counts[: len(mask)] = mask.sum(1)
    positions = np.full((num_rows, max(counts.max(), 1)), -1, np.int32)
    for row, chosen in enumerate(mask):
        positions[row, : counts[row]] = np.flatnonzero(chosen)
    slot_ids = np.where(positions >= 0, slots[positions], -1).astype(np.int32)
    return IndexSelection(*(paddle.to_tensor(array) for array in (positions, slot_ids, counts)))


def mask_of(selection: IndexSelection, length: int) -> np.ndarray:
    """The inverse of selection_of."""
    return mask_of_positions(selection.positions.numpy()[:length])


def mask_of_positions(positions: np.ndarray) -> np.ndarray:
    """[T, T] bool from [T, topk] positions with a -1 tail."""
    mask = np.zeros((len(positions), len(positions)), bool)
    row, place = np.nonzero(positions >= 0)
    mask[row, positions[row, place]] = True
    return mask


@contextmanager
def forced(masks: Sequence[np.ndarray]) -> Iterator[None]:
    """The indexers of a model select masks, one per layer that selects, for one request that runs in one step."""
    remaining = iter(masks)

    def index_select(*, query: Any, index_cache: Any, block_table: Any, **rest: Any) -> IndexSelection:
        mask = next(remaining)
        return selection_of(mask, token_slots(block_table, index_cache.shape[1], len(mask)), len(query))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastdeploy_dsa.indexer, "index_select", index_select)
        yield
