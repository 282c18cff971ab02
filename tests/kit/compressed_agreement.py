"""The float64 model of DeepSeek-V4 that reads the package's caches, after checking that they are its own, rounded."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdeploy_dsa.ops import reference
from tests.kit.compressed_serving import CompressedServing, ServedEntries
from tests.kit.reference_model import formats
from tests.kit.reference_model.compressed import CompressedReferenceModel
from tests.kit.rounding_noise import half_step_of_bfloat16, half_step_of_fp8
from tests.kit.serving import _packed

NOISE = 2e-5  # of the largest number: float32 arithmetic in front of the rounding
VALUE_GROUP = 64


class Given(CompressedReferenceModel):
    """The float64 model that reads the package's caches and selects what the package selected."""

    def __init__(self, model: CompressedReferenceModel, serving: CompressedServing, served: ServedEntries) -> None:
        super().__init__(model.config, model.weights)
        self._serving, self._served = serving, served
        self.largest_error: dict[str, float] = {}

    def stored(self, kind: str, layer: int, rows: np.ndarray) -> np.ndarray:
        held = cached_rows(self._serving, kind, layer, len(rows))
        error = np.abs(held - rows)
        bound = rounding_bound(rows, kind, self._serving) + NOISE * np.abs(rows).max()
        wrong = ~(error <= bound)
        assert not wrong.any(), (
            f"{kind} of layer {layer}: {int(wrong.sum())} of {wrong.size} are not the rounded number"
        )
        self.largest_error[kind] = max(self.largest_error.get(kind, 0.0), float(error.max()))
        return held

    def selection(self, x: Any, q_c: Any, prefix: str, layer: int, angles: Any, visible: Any, records: Any) -> Any:
        own = super().selection(x, q_c, prefix, layer, angles, visible, records)
        positions = self._served.positions[layer]
        mask = np.zeros(own.shape, bool)
        row, place = np.nonzero(positions >= 0)
        mask[row, positions[row, place]] = True
        if self._serving.backend.cache_format == "float32":  # queries are rounded as keys are
            assert np.array_equal(mask, own), f"selected sets of layer {layer}"
        assert np.array_equal(mask.sum(1), own.sum(1)), f"number of selected entries of layer {layer}"
        records[0][layer] = mask
        return mask


def rounding_bound(rows: np.ndarray, kind: str, serving: CompressedServing) -> np.ndarray:
    """Half a step of the format for every number; numbers that are rounded twice have both."""
    cache_format, rope = serving.backend.cache_format, serving.backend.sizes.qk_rope_head_dim
    if cache_format == "float32":
        return np.zeros(rows.shape)
    bound = half_step_of_bfloat16(rows)
    if cache_format == "bfloat16":
        return bound
    if kind == "index_key":
        scale = formats.index_scale(np.abs(rows).max(-1, keepdims=True) * (1 + 2.0**-8))
        exponent = np.maximum(np.frexp(rows / scale)[1] - 1, -6)
        return bound + np.ldexp(scale, exponent - 4)
    value = rows.shape[-1] - rope
    for first in range(0, value, VALUE_GROUP):
        group = slice(first, min(first + VALUE_GROUP, value))
        bound[:, group] += half_step_of_fp8(rows[:, group] * (1 + 2.0**-8))
    return bound


def cached_rows(serving: CompressedServing, kind: str, layer: int, count: int) -> np.ndarray:
    """The dequantised rows of the only request, in order of position or of entry."""
    sizes, order = serving.backend.sizes, np.arange(count)
    if kind == "row":
        table, block, role = serving.window_tables["swa"][0], 64, "swa"
    else:
        ratio = dict(sizes.ratios)[layer]
        table, block, role = serving.block_table[0], serving.block_size // ratio, "key"
    slots = table[order // block].astype(np.int64) * block + order % block
    if kind != "index_key":
        cache = _packed(serving.caches[role, layer])
        widths = {"head_dim": sizes.head_dim, "rope_dim": sizes.qk_rope_head_dim}
        return reference.compressed_row_read(cache=cache, slot_ids=slots, block_rows=block, **widths).astype(float)
    cache = _packed(serving.caches["indexer", layer])
    if cache.dtype == np.uint8:  # filled up behind the keys of a block
        width = sizes.index_head_dim + 4
        cache = cache[:, : block * width].reshape(-1, block, width)
    keys, scales = reference.read_index_keys(cache, slots)
    return keys.astype(float) * scales.astype(float)[:, None]
