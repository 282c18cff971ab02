"""The rotations of a step's rows, by the layers that use them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fastdeploy_dsa.attention.deepseek_v4.step import CompressedStep
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.rotary import RotaryTable, Rotation


class LayerRotations(NamedTuple):
    """Of one kind of layer.

    Attributes:
        of_rows: At every row's position: window rows, queries and, undone, outputs.
        of_windows: At the first position of the compression window that holds the row: where its entry stands; None
            for layers without entries.
    """

    of_rows: Rotation
    of_windows: Rotation | None


class RotaryTables:
    """Two tables: one for layers that see the window only, one for everything in layers with entries (rule S8)."""

    def __init__(self, config: CompressedConfig, layer_ids: Iterable[int]) -> None:
        """Make the tables for these layers; each grows with the longest context seen."""
        self._ratios = sorted({config.ratio(layer) for layer in layer_ids} - {1})
        self._main = RotaryTable(config.main_rope, config.qk_rope_head_dim)
        self._compress = RotaryTable(config.compress_rope, config.qk_rope_head_dim)

    def lookup(self, step: CompressedStep) -> Mapping[int, LayerRotations]:
        """The rotations of layers by their compression ratio, 1 for window-only layers."""
        found = {1: LayerRotations(self._main.lookup(step.positions, step.max_length), None)}
        if self._ratios:
            of_rows = self._compress.lookup(step.positions, step.max_length)
            for ratio in self._ratios:
                first = step.positions // ratio * ratio
                found[ratio] = LayerRotations(of_rows, self._compress.lookup(first, step.max_length))
        return found
