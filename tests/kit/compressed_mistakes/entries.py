"""Entries: the compressor in NumPy, made wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import paddle

import fastdeploy_dsa.attention.deepseek_v4.base as base_module
import fastdeploy_dsa.attention.deepseek_v4.compressor as compressor_module
from fastdeploy_dsa.ops import compressed_row_write, index_key_write
from fastdeploy_dsa.rotary import Rotation
from tests.kit.compressed_mistakes.planting import Mistake, Planting


@dataclass(frozen=True)
class Window:
    """What an entry is made from: positions [members], kv and score [members, width], bias included; float64."""

    positions: np.ndarray
    kv: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Tokens:
    """All tokens of the request: kv, score and bias [T, coff * width], and how they are grouped."""

    kv: np.ndarray
    score: np.ndarray
    bias: np.ndarray
    ratio: int
    overlap: int
    prompt_length: int

    @property
    def width(self) -> int:
        return self.kv.shape[1] // self.overlap

    def window(self, entry: int) -> Window:
        """The right members, oldest first."""
        first, last = (entry + 1 - self.overlap) * self.ratio, (entry + 1) * self.ratio
        positions = np.arange(max(first, 0), last)
        own = np.arange(last - self.ratio, last)
        halves = self._columns(positions < own[0])
        kv = np.take_along_axis(self.kv[positions], halves, axis=1)
        score = np.take_along_axis((self.score + self.bias)[positions], halves, axis=1)
        return Window(positions, kv, score)

    def _columns(self, is_older: np.ndarray) -> np.ndarray:
        offset = np.where(is_older, 0, (self.overlap - 1) * self.width)
        return offset[:, None] + np.arange(self.width)[None, :]


Variant = Callable[[Tokens, int], Window]


def compressing(variant: Variant, *, where: str) -> Mistake:
    """Entries of some compressors are made from variant(tokens, entry) in place of the right window.

    where: "csa" and "hca" for the compressors of attention rows by ratio, "index" for those of index keys, "all".
    """

    def plant(planting: Planting) -> None:
        right = compressor_module.kv_compress

        def wrong(*, kv_score: Any, ape: Any, ratio: int, entry_kind: str, **rest: Any) -> None:
            kind = "index" if entry_kind == "index_key" else {4: "csa", 128: "hca"}[ratio]
            right(kv_score=kv_score, ape=ape, ratio=ratio, entry_kind=entry_kind, **rest)
            if where in (kind, "all"):
                numbers = kv_score.numpy()[: planting.length].astype(np.float64)
                half = numbers.shape[1] // 2
                bias = ape.numpy().astype(np.float64)[np.arange(planting.length) % ratio]
                tokens = Tokens(
                    numbers[:, :half], numbers[:, half:], bias, ratio, rest["overlap"], planting.prompt_length
                )
                write_entries(tokens, variant, entry_kind, rest)

        planting.patch.setattr(compressor_module, "kv_compress", wrong)

    return plant


def write_entries(tokens: Tokens, variant: Variant, entry_kind: str, rest: Mapping[str, Any]) -> None:
    """Over the entries that the right compressor has written."""
    closing = np.arange(tokens.ratio - 1, len(tokens.kv), tokens.ratio)
    if not len(closing):
        return
    rows = []
    for entry in range(len(closing)):
        window = variant(tokens, entry)
        weights = np.exp(window.score - window.score.max(axis=0))
        row = (weights * window.kv).sum(axis=0) / weights.sum(axis=0)
        rows.append(row / np.sqrt(np.mean(row**2) + rest["eps"]) * rest["norm_weight"].numpy())
    cos, sin = (paddle.to_tensor(rest[name].numpy()[closing]) for name in ("cos", "sin"))
    rotated = base_module.rotate_last(
        paddle.to_tensor(np.array(rows, np.float32)), Rotation(cos, sin, paddle.complex(cos, sin))
    )
    slots = paddle.to_tensor(rest["entry_slots"].numpy()[closing])
    if entry_kind == "index_key":
        index_key_write(key=rotated, cache=rest["entry_cache"], slot_mapping=slots)
    else:
        compressed_row_write(
            rows=rotated,
            cache=rest["entry_cache"],
            slot_mapping=slots,
            rope_dim=rest["rope_dim"],
            block_rows=rest["block_rows"],
        )


def own_window_only(tokens: Tokens, entry: int) -> Window:
    window = tokens.window(entry)
    own = window.positions >= entry * tokens.ratio
    return Window(window.positions[own], window.kv[own], window.score[own])


def older_half_of_the_same_window(tokens: Tokens, entry: int) -> Window:
    own, width = np.arange(entry * tokens.ratio, (entry + 1) * tokens.ratio), tokens.width
    kv, score = tokens.kv[own], (tokens.score + tokens.bias)[own]
    stacked = [np.concatenate([part[:, :width], part[:, width:]]) for part in (kv, score)]
    return Window(np.concatenate([own, own]), *stacked)


def halves_swapped(tokens: Tokens, entry: int) -> Window:
    swap = [np.roll(part, tokens.width, axis=1) for part in (tokens.kv, tokens.score, tokens.bias)]
    return replace(tokens, kv=swap[0], score=swap[1], bias=swap[2]).window(entry)


def mean_pooling(tokens: Tokens, entry: int) -> Window:
    window = tokens.window(entry)
    return replace(window, score=np.zeros_like(window.score))


def without_bias(tokens: Tokens, entry: int) -> Window:
    return replace(tokens, bias=np.zeros_like(tokens.bias)).window(entry)


def previous_window_lost_at_decode(tokens: Tokens, entry: int) -> Window:
    """The first entry that closes while decoding does not see the window before it."""
    first_closed = tokens.prompt_length // tokens.ratio
    return own_window_only(tokens, entry) if entry == first_closed else tokens.window(entry)


def open_window_lost_at_decode(tokens: Tokens, entry: int) -> Window:
    """Entries that close while decoding do not see the prompt's tokens of the window that was open."""
    window = tokens.window(entry)
    if (entry + 1) * tokens.ratio <= tokens.prompt_length:
        return window
    first_lost = tokens.prompt_length // tokens.ratio * tokens.ratio
    kept = (window.positions < first_lost) | (window.positions >= tokens.prompt_length)
    return Window(window.positions[kept], window.kv[kept], window.score[kept])


def bias_phase_restarts(tokens: Tokens, entry: int) -> Window:
    """While decoding, the first token takes the first bias, whatever its place in the window."""
    decoding = np.arange(tokens.prompt_length, len(tokens.kv))
    bias = tokens.bias.copy()
    bias[decoding] = tokens.bias[decoding - tokens.prompt_length]
    return replace(tokens, bias=bias).window(entry)
