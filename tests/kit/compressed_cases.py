"""Cases of the ops of compressed attention; see cases.py for what all cases promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference.compressed import SCALE_ALIGNMENT, VALUE_GROUP, state_place
from tests.kit.cases.common import (
    DTYPES,
    SPARE_BLOCKS,
    Arguments,
    Format,
    index_cache,
    numbers_as,
    rows_of_many_sizes,
    slot_mapping_with_invalid_ids,
)
from tests.kit.poison import fill_with_invalid_ids, invalid_ids, poisoned_blocks, with_row_stride

BLOCK_ALIGNMENT = 576  # bytes that an fp8 block is filled up to a multiple of

EntryKind = Literal["row", "index_key"]
Sinks = Literal["random", "none"]


def filled_up(num_bytes: int) -> int:
    """Bytes of an fp8 block with what fills it up."""
    return -(-num_bytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


def row_cache(
    num_blocks: int, block_rows: int, head_dim: int, rope_dim: int, cache_format: str, gap_bytes: int = 0
) -> NDArray[Any]:
    """A poisoned cache of compressed rows: [num_blocks, block_bytes] for fp8, else [num_blocks, rows, head_dim]."""
    value_dim = head_dim - rope_dim
    scale_bytes = -(-value_dim // (VALUE_GROUP * SCALE_ALIGNMENT)) * SCALE_ALIGNMENT
    shape: tuple[int, ...] = (block_rows, head_dim)
    if cache_format == "fp8":
        shape = (filled_up(block_rows * (value_dim + 2 * rope_dim + scale_bytes)),)
    return poisoned_blocks(num_blocks, shape, DTYPES[cache_format], gap_bytes=gap_bytes)


def key_cache(num_blocks: int, block_rows: int, head_dim: int, cache_format: str, gap_bytes: int = 0) -> NDArray[Any]:
    """A poisoned cache of index keys, fp8 blocks filled up: [num_blocks, block_bytes]."""
    if cache_format != "fp8":
        return index_cache(num_blocks, block_rows, head_dim, cache_format, gap_bytes)
    return poisoned_blocks(num_blocks, (filled_up(block_rows * (head_dim + 4)),), np.uint8, gap_bytes=gap_bytes)


@dataclass(frozen=True)
class CompressedRowWriteCase:
    """Rows that go to scattered slots of a poisoned cache."""

    num_tokens: int = 41
    head_dim: int = 512
    rope_dim: int = 64
    block_rows: int = 64
    input_format: str = "float32"
    cache_format: str = "fp8"
    gap_bytes: int = 0
    has_row_strides: bool = False
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of compressed_row_write."""
        rng = np.random.default_rng(self.seed)
        num_blocks = -(-self.num_tokens // self.block_rows) + SPARE_BLOCKS
        rows = numbers_as(rows_of_many_sizes(rng, (self.num_tokens, self.head_dim)), self.input_format)
        return {
            "rows": with_row_stride(rows) if self.has_row_strides else rows,
            "cache": row_cache(
                num_blocks, self.block_rows, self.head_dim, self.rope_dim, self.cache_format, self.gap_bytes
            ),
            "slot_mapping": slot_mapping_with_invalid_ids(rng, self.num_tokens, num_blocks * self.block_rows),
            "rope_dim": self.rope_dim,
            "block_rows": self.block_rows,
        }


@dataclass(frozen=True)
class CompressedRowReadCase:
    """Scattered rows of a cache in which no other is written."""

    num_rows: int = 41
    head_dim: int = 512
    rope_dim: int = 64
    block_rows: int = 64
    cache_format: str = "fp8"
    gap_bytes: int = 0
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of compressed_row_read."""
        written = CompressedRowWriteCase(
            num_tokens=self.num_rows,
            **{name: getattr(self, name) for name in ("head_dim", "rope_dim", "block_rows", "cache_format")},
            gap_bytes=self.gap_bytes,
            seed=self.seed,
        ).arguments()
        reference.compressed_row_write(**written)
        return {
            "cache": written["cache"],
            "slot_ids": written["slot_mapping"],
            "head_dim": self.head_dim,
            "rope_dim": self.rope_dim,
            "block_rows": self.block_rows,
        }


@dataclass(frozen=True)
class KvCompressCase:
    """Tokens of several requests, whose earlier states are written as far as a window needs them.

    Attributes:
        spans: First position and number of tokens of every request, in this call.
        has_padding: Some rows are padding, with slots and ids that would do harm.
        score_size: Standard deviation of the scores; large ones make one member dominate.
        extra_columns: Of the ring of state blocks, beyond those that window and tokens need.
    """

    spans: tuple[tuple[int, int], ...] = ((0, 11), (6, 5), (125, 9), (3, 1), (1, 0))
    ratio: int = 4
    overlap: int = 2
    head_dim: int = 512
    rope_dim: int = 64
    state_block_tokens: int = 4
    block_rows: int = 64
    entry_kind: EntryKind = "row"
    entry_format: Format = "fp8"
    scale_format: Literal["ue8m0", "plain"] = "ue8m0"
    has_padding: bool = True
    score_size: float = 1.0
    extra_columns: int = 1
    gap_bytes: int = 0
    has_row_strides: bool = False
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of kv_compress."""
        rng = np.random.default_rng(self.seed)
        width = self.overlap * self.head_dim
        positions, request_ids, lengths = self._tokens()
        state_cache, state_table = self._states(rng)
        num_tokens, num_blocks = len(positions), -(-len(positions) // self.block_rows) + SPARE_BLOCKS
        entry_slots = rng.permutation(num_blocks * self.block_rows)[:num_tokens].astype(np.int64)
        closes = (positions + 1) % self.ratio == 0
        fill_with_invalid_ids(entry_slots, closes & (np.arange(num_tokens) % 5 == 4), num_blocks * self.block_rows)
        first = positions.astype(np.int64) // self.ratio * self.ratio
        angles = first[:, None] * 1e4 ** -(np.arange(self.rope_dim // 2) / (self.rope_dim // 2))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        cos[~closes] = sin[~closes] = np.nan
        kv_score = self._kv_score(rng, num_tokens)
        is_padding = lengths <= 0
        kv_score[is_padding] = np.nan
        fill_with_invalid_ids(positions, is_padding, 0)
        fill_with_invalid_ids(request_ids, is_padding, len(state_table))
        return {
            "kv_score": with_row_stride(kv_score) if self.has_row_strides else kv_score,
            "ape": rng.standard_normal((self.ratio, width)).astype(np.float32),
            "norm_weight": rng.uniform(0.5, 1.5, self.head_dim).astype(np.float32),
            "cos": cos,
            "sin": sin,
            "state_cache": state_cache,
            "state_table": state_table,
            "positions": positions,
            "request_ids": request_ids,
            "lengths": lengths,
            "entry_cache": self.entries(num_blocks),
            "entry_slots": entry_slots,
            "eps": 1e-6,
            "ratio": self.ratio,
            "overlap": self.overlap,
            "rope_dim": self.rope_dim,
            "block_rows": self.block_rows,
            "entry_kind": self.entry_kind,
            "scale_format": self.scale_format,
        }

    def entries(self, num_blocks: int) -> NDArray[Any]:
        """A poisoned entry cache."""
        if self.entry_kind == "index_key":
            return key_cache(num_blocks, self.block_rows, self.head_dim, self.entry_format, self.gap_bytes)
        return row_cache(num_blocks, self.block_rows, self.head_dim, self.rope_dim, self.entry_format, self.gap_bytes)

    def _tokens(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Positions, request ids and lengths of the rows, padding rows behind each request and at the end."""
        rows: list[tuple[int, int, int]] = []
        for request, (first, count) in enumerate(self.spans):
            rows += [(position, request, position + 1) for position in range(first, first + count)]
            # A position that would close a window, of a request that is there.
            rows += [(self.ratio * self.overlap - 1, 0, -request)] if self.has_padding else []
        table = np.array(rows, np.int32).reshape(-1, 3)
        positions, request_ids, lengths = (np.ascontiguousarray(table[:, i]) for i in range(3))
        return positions, request_ids, lengths

    def _kv_score(self, rng: np.random.Generator, num_tokens: int) -> NDArray[np.float32]:
        width = self.overlap * self.head_dim
        values = rows_of_many_sizes(rng, (num_tokens, width))
        scores = (rng.standard_normal((num_tokens, width)) * self.score_size).astype(np.float32)
        return np.concatenate([values, scores], -1)

    def _states(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """States of the positions that windows of this call look back to, and the rings of blocks."""
        back, block_tokens = self.overlap * self.ratio - 1, self.state_block_tokens
        reach = back + max((count for _, count in self.spans), default=0)
        columns = reach // block_tokens + 2 + self.extra_columns
        state_table = np.zeros((max(len(self.spans), 1), columns), np.int32)
        used = [self._used_columns(first, count, columns) for first, count in self.spans]
        num_blocks = sum(map(len, used)) + SPARE_BLOCKS
        fill_with_invalid_ids(state_table, np.ones(state_table.shape, bool), num_blocks)
        free = iter(rng.permutation(num_blocks).tolist())
        cache = poisoned_blocks(
            num_blocks, (block_tokens, 2 * self.overlap * self.head_dim), np.float32, gap_bytes=self.gap_bytes
        )
        for request, (first, _) in enumerate(self.spans):
            for column in used[request]:
                state_table[request, column] = next(free)
            for position in range(max(first - back, 0), first):
                block, row = state_place(position, state_table[request], cache)
                cache[block, row] = self._kv_score(rng, 1)[0]
        return cache, state_table

    def _used_columns(self, first: int, count: int, columns: int) -> list[int]:
        start = max(first - self.overlap * self.ratio + 1, 0)
        return sorted({p // self.state_block_tokens % columns for p in range(start, first + count)})


@dataclass(frozen=True)
class CompressedMlaCase:
    """Query rows over window rows and entries of two caches in which only selected slots are written.

    Attributes:
        window_counts: Leading window slots of every row; those behind name poisoned rows. None: all of them.
        entry_counts: The same of the entries.
        entry_width: 0: the layer has no entries.
        invalid_every: Every so manieth slot lies outside its cache; 0: none.
        logit_size: Standard deviation of the attention logits.
        sinks: "random"; "none": -inf in every head.
    """

    num_tokens: int = 3
    num_heads: int = 16
    window_width: int = 40
    entry_width: int = 70
    window_counts: tuple[int, ...] | None = None
    entry_counts: tuple[int, ...] | None = None
    head_dim: int = 512
    rope_dim: int = 64
    window_block_rows: int = 64
    entry_block_rows: int = 2
    query_format: Literal["bfloat16", "float32"] = "float32"
    cache_format: Format = "fp8"
    invalid_every: int = 7
    logit_size: float = 1.0
    sinks: Sinks = "random"
    gap_bytes: int = 0
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of compressed_mla."""
        rng = np.random.default_rng(self.seed)
        window = self._part(rng, self.window_width, self.window_counts, self.window_block_rows)
        entry = self._part(rng, self.entry_width, self.entry_counts, self.entry_block_rows)
        if not self.entry_width:
            entry = (None, None, None)
        query = rng.standard_normal((self.num_tokens, self.num_heads, self.head_dim)).astype(np.float32)
        sinks = rng.uniform(-4, 6, self.num_heads).astype(np.float32)
        return {
            "query": numbers_as(query, self.query_format),
            **dict(zip(("window_cache", "window_slots", "window_counts"), window, strict=True)),
            "window_block_rows": self.window_block_rows,
            **dict(zip(("entry_cache", "entry_slots", "entry_counts"), entry, strict=True)),
            "entry_block_rows": self.entry_block_rows,
            "sinks": sinks if self.sinks == "random" else np.full_like(sinks, -np.inf),
            "rope_dim": self.rope_dim,
            "softmax_scale": self.logit_size * self.head_dim**-0.5,
        }

    def _part(
        self, rng: np.random.Generator, width: int, counts: tuple[int, ...] | None, block_rows: int
    ) -> tuple[NDArray[Any] | None, NDArray[np.int32] | None, NDArray[np.int32] | None]:
        """One cache, its slots and its counts."""
        num_blocks = -(-2 * max(width, 1) // block_rows) + SPARE_BLOCKS
        num_slots = num_blocks * block_rows
        cache = row_cache(num_blocks, block_rows, self.head_dim, self.rope_dim, self.cache_format, self.gap_bytes)
        order = rng.permutation(num_slots)
        readable, poisoned = order[: num_slots // 2], order[num_slots // 2 :]
        slots = readable[rng.integers(0, len(readable), (self.num_tokens, width))].astype(np.int32)
        if self.invalid_every:
            is_invalid = np.broadcast_to(np.arange(width) % self.invalid_every == 2, slots.shape)
            fill_with_invalid_ids(slots, is_invalid, num_slots)
        if counts is not None:
            behind = np.arange(width) >= np.array(counts)[:, None]
            slots[behind] = np.resize(poisoned, int(behind.sum()))
        reference.compressed_row_write(
            rows=rng.standard_normal((len(readable), self.head_dim)).astype(np.float32),
            cache=cache,
            slot_mapping=readable.astype(np.int64),
            rope_dim=self.rope_dim,
            block_rows=block_rows,
        )
        return cache, slots, None if counts is None else np.array(counts, np.int32)


@dataclass(frozen=True)
class InverseRopeCase:
    """Attention outputs of many sizes at random angles."""

    num_tokens: int = 5
    num_heads: int = 16
    head_dim: int = 512
    rope_dim: int = 64
    x_format: Literal["bfloat16", "float32"] = "float32"
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of inverse_rope."""
        rng = np.random.default_rng(self.seed)
        x = rows_of_many_sizes(rng, (self.num_tokens, self.num_heads, self.head_dim))
        angles = rng.uniform(-np.pi, np.pi, (self.num_tokens, self.rope_dim // 2))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        return {"x": numbers_as(x, self.x_format), "cos": cos, "sin": sin}


def rejected_requests(num_requests: int) -> list[int]:
    """Request ids that kv_compress refuses on the CPU."""
    return invalid_ids(num_requests, np.int32)
