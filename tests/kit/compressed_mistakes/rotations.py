"""Wrong tables, wrong positions, wrong numbers rotated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import paddle
import pytest

import fastdeploy_dsa.attention.deepseek_v4.base as base_module
import fastdeploy_dsa.attention.deepseek_v4.compressor as compressor_module
import fastdeploy_dsa.attention.deepseek_v4.indexer as indexer_module
import fastdeploy_dsa.attention.deepseek_v4.o_proj as o_proj_module
from fastdeploy_dsa.attention.deepseek_v4.step import CompressedStep
from fastdeploy_dsa.rotary import RotaryTable, Rotation, rotate_halves, rotate_interleaved
from tests.kit.compressed_mistakes.entries import Tokens, write_entries
from tests.kit.compressed_mistakes.planting import Mistake, Planting, magnitude


def tables(change: Callable[[Planting, Any], None]) -> Mistake:
    return lambda planting: change(planting, planting.serving.model._rotary)


def _table(planting: Planting, rope: Any) -> RotaryTable:
    return RotaryTable(rope, planting.config.qk_rope_head_dim)


def entry_positions(wrong: Callable[[Any, int], Any]) -> Mistake:
    """Entries are rotated at wrong(positions, ratio) in place of the window's first position."""

    def change(planting: Planting, rotary: Any) -> None:
        right = rotary.lookup

        def lookup(step: CompressedStep) -> Any:
            found = right(step)
            for ratio in set(found) - {1}:
                moved = rotary._compress.lookup(wrong(step.positions, ratio), step.max_length)
                found[ratio] = found[ratio]._replace(of_windows=moved)
            return found

        planting.patch.setattr(rotary, "lookup", lookup)

    return tables(change)


def compress_table_in_window_layers(planting: Planting, rotary: Any) -> None:
    planting.patch.setattr(rotary, "_main", _table(planting, planting.config.compress_rope))


def main_table_in_compressed_layers(planting: Planting, rotary: Any) -> None:
    planting.patch.setattr(rotary, "_compress", _table(planting, planting.config.main_rope))


def no_yarn(planting: Planting, rotary: Any) -> None:
    plain = replace(planting.config.compress_rope, rope_type="default")
    planting.patch.setattr(rotary, "_compress", _table(planting, plain))


def times_mscale(planting: Planting, rotary: Any) -> None:
    longer = replace(planting.config.compress_rope, table_multiplier=magnitude(planting))
    planting.patch.setattr(rotary, "_compress", _table(planting, longer))


def decode_positions_plus_1(planting: Planting, rotary: Any) -> None:
    """Of everything that is rotated at a row's position; entries stay where they are."""
    right = rotary.lookup

    def lookup(step: CompressedStep) -> Any:
        found = right(step)
        late = step.positions + (step.positions >= planting.prompt_length).astype("int32")
        for ratio in found:
            table = rotary._main if ratio == 1 else rotary._compress
            found[ratio] = found[ratio]._replace(of_rows=table.lookup(late, step.max_length + 1))
        return found

    planting.patch.setattr(rotary, "lookup", lookup)


def rotating(rotate: Callable[[Any, Rotation], Any], *modules: ModuleType) -> Mistake:
    """rotate(x, rotation) in place of rotating the last numbers, in some modules."""

    def plant(planting: Planting) -> None:
        for module in modules:
            planting.patch.setattr(module, "rotate_last", rotate)

    return plant


def last_by_halves(x: Any, rotation: Rotation) -> Any:
    kept = x.shape[-1] - 2 * rotation.cos.shape[-1]
    return paddle.concat([x[..., :kept], rotate_halves(x[..., kept:], rotation)], axis=-1)


def first(x: Any, rotation: Rotation) -> Any:
    width = 2 * rotation.cos.shape[-1]
    return paddle.concat([rotate_interleaved(x[..., :width], rotation), x[..., width:]], axis=-1)


def _undone(x: Any, cos: Any, sin: Any) -> Rotation:
    return Rotation(cos, -sin, paddle.complex(cos, -sin))


def everywhere(rotate: Callable[[Any, Rotation], Any]) -> Mistake:
    """Rows, queries, entries, index queries and index keys are rotated otherwise, and undone alike."""

    def plant(planting: Planting) -> None:
        rotating(rotate, base_module, indexer_module)(planting)
        _rotated_entries(planting, rotate, ("row", "index_key"))

        def undo(*, x: Any, cos: Any, sin: Any, cpu: Any) -> None:
            x.set_value(rotate(x, _undone(x, cos, sin)))

        planting.patch.setattr(o_proj_module, "inverse_rope", undo)

    return plant


def in_the_indexer(rotate: Callable[[Any, Rotation], Any]) -> Mistake:
    def plant(planting: Planting) -> None:
        rotating(rotate, indexer_module)(planting)
        _rotated_entries(planting, rotate, ("index_key",))

    return plant


def _rotated_entries(planting: Planting, rotate: Callable[[Any, Rotation], Any], kinds: tuple[str, ...]) -> None:
    """Entries of some kinds, made anew from the right windows, are rotated by rotate."""
    right = compressor_module.kv_compress

    def wrong(*, entry_kind: str, **rest: Any) -> None:
        right(entry_kind=entry_kind, **rest)
        if entry_kind not in kinds:
            return
        numbers = rest["kv_score"].numpy()[: planting.length].astype(np.float64)
        half, ratio = numbers.shape[1] // 2, rest["ratio"]
        bias = rest["ape"].numpy().astype(np.float64)[np.arange(planting.length) % ratio]
        tokens = Tokens(numbers[:, :half], numbers[:, half:], bias, ratio, rest["overlap"], planting.prompt_length)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base_module, "rotate_last", rotate)
            write_entries(tokens, Tokens.window, entry_kind, rest)

    planting.patch.setattr(compressor_module, "kv_compress", wrong)
