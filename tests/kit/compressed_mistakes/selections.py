"""Selections of the wrong entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import paddle

import fastdeploy_dsa.attention.deepseek_v4.indexer as indexer_module
from fastdeploy_dsa.attention.deepseek_v4.step import SELECTED_RATIO
from fastdeploy_dsa.ops import IndexSelection
from tests.kit.compressed_mistakes.planting import Mistake, Planting


@dataclass(frozen=True)
class Scoring:
    """What a selection is made from, for the T tokens of the request, float64.

    query [T, heads, D]; head_weights [T, heads] with both factors folded in; key [entries, D]; counts [T] of visible
    entries; topk; prompt_length.
    """

    query: np.ndarray
    head_weights: np.ndarray
    key: np.ndarray
    counts: np.ndarray
    topk: int
    prompt_length: int

    def scores(self, *, weights: np.ndarray | None = None, has_relu: bool = True) -> np.ndarray:
        """[T, entries], every entry for every row."""
        dots = self.query @ self.key.T
        rectified = np.maximum(dots, 0.0) if has_relu else dots
        return np.einsum("th,ths->ts", self.head_weights if weights is None else weights, rectified)

    @property
    def visible(self) -> np.ndarray:
        return np.arange(len(self.key))[None, :] < self.counts[:, None]

    def best(self, scores: np.ndarray) -> np.ndarray:
        """The topk best visible entries of every row."""
        ranked = np.argsort(np.where(self.visible, -scores, np.inf), axis=1, kind="stable")[:, : self.topk]
        mask = np.zeros(scores.shape, bool)
        np.put_along_axis(mask, ranked, True, axis=1)
        return mask & self.visible


def choosing(choose: Callable[[Scoring], np.ndarray]) -> Mistake:
    """Every indexer selects what choose says: a [T, entries] mask."""

    def plant(planting: Planting) -> None:
        def index_select(**given: Any) -> IndexSelection:
            length, block = planting.length, planting.serving.block_size // SELECTED_RATIO
            entries = np.arange(length // SELECTED_RATIO)
            slots = planting.serving.block_table[0, entries // block] * block + entries % block
            cache = given["index_cache"]
            key = cache.reshape([-1, cache.shape[-1]]).numpy()[slots]
            query, folded = (given[name].numpy()[:length].astype(np.float64) for name in ("query", "folded_weights"))
            counts = given["lengths"].numpy()[:length]
            scoring = Scoring(query, folded, key.astype(np.float64), counts, given["topk"], planting.prompt_length)
            return _as_selection(choose(scoring), slots, len(given["query"]))

        planting.patch.setattr(indexer_module, "index_select", index_select)

    return plant


def _as_selection(mask: np.ndarray, slots: np.ndarray, num_rows: int) -> IndexSelection:
    counts = np.zeros(num_rows, np.int32)
    counts[: len(mask)] = mask.sum(axis=1)
    numbers = np.full((num_rows, max(int(counts.max()), 1)), -1, np.int32)
    for row, chosen in enumerate(mask):
        numbers[row, : counts[row]] = np.flatnonzero(chosen)
    slot_ids = np.where(numbers >= 0, slots[numbers], -1).astype(np.int32)
    return IndexSelection(*(paddle.to_tensor(array) for array in (numbers, slot_ids, counts)))


def newest(s: Scoring) -> np.ndarray:
    numbers = np.arange(len(s.key))[None, :]
    return s.visible & (numbers >= s.counts[:, None] - s.topk)


def previous_while_decoding(s: Scoring) -> np.ndarray:
    right = s.best(s.scores())
    late = right.copy()
    late[s.prompt_length :] = right[s.prompt_length - 1 : -1]
    return late


def topk_of(change: int) -> Mistake:
    def plant(planting: Planting) -> None:
        changed = replace(planting.config, index_topk=planting.config.index_topk + change)
        for attention in planting.attentions(SELECTED_RATIO):
            planting.patch.setattr(attention.indexer, "_config", changed)

    return plant


def folded_times(factor: Callable[[Any], float]) -> Mistake:
    """Head weights times a factor computed from the config: a missing constant."""

    def plant(planting: Planting) -> None:
        right = indexer_module.index_query_quant

        def wrong(**arguments: Any) -> Any:
            quantized, folded = right(**arguments)
            return quantized, folded * factor(planting.config)

        planting.patch.setattr(indexer_module, "index_query_quant", wrong)

    return plant
