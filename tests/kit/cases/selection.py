"""Cases of the ops that score and select: indexer_logits, topk_slots, index_select."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from tests.kit.cases.common import SPARE_BLOCKS, SPARE_COLUMNS, Arguments, Format, index_cache, numbers_as
from tests.kit.poison import fill_with_invalid_ids, with_row_stride

Keys = Literal["random", "tied", "close"]
Scores = Literal["random", "plateau", "close", "special"]


@dataclass(frozen=True)
class IndexerCase:
    """Query rows over paged contexts. Keys were written by the reference; all other bytes are poison.

    Attributes:
        lengths: Visible keys of every row; <= 0 is a padding row.
        requests: Request of every row; None: every row is its own request.
        keys: "random"; "tied": few distinct keys and numbers so small that every sum is exact; "close": scores that
            differ in their last bits only.
    """

    lengths: tuple[int, ...] = (130, 1, 0, 64, 65, 200)
    requests: tuple[int, ...] | None = None
    index_n_heads: int = 64
    index_head_dim: int = 128
    block_size: int = 64
    cache_format: Format = "fp8"
    scale_format: Literal["ue8m0", "plain"] = "ue8m0"
    gap_bytes: int = 0
    keys: Keys = "random"
    seed: int = 0

    @property
    def row_requests(self) -> tuple[int, ...]:
        """Request of every row."""
        return tuple(range(len(self.lengths))) if self.requests is None else self.requests

    def arguments(self) -> Arguments:
        """Of indexer_logits."""
        rng = np.random.default_rng(self.seed)
        lengths, request_ids = np.array(self.lengths, np.int32), np.array(self.row_requests, np.int32)
        query, folded_weights = self._queries(rng)
        cache, block_table = self._cache(rng, lengths, request_ids)
        fill_with_invalid_ids(request_ids, lengths <= 0, len(block_table))
        return {
            "query": query,
            "folded_weights": folded_weights,
            "index_cache": cache,
            "block_table": block_table,
            "request_ids": request_ids,
            "lengths": lengths,
            "logits_width": max(0, 0, *self.lengths) + SPARE_COLUMNS,
        }

    def selection_arguments(self, *, topk: int, max_logits_bytes: int = 512 << 20) -> Arguments:
        """Of index_select."""
        arguments = self.arguments()
        del arguments["logits_width"]
        return arguments | {
            "max_length": max(0, 0, *self.lengths),
            "topk": topk,
            "max_logits_bytes": max_logits_bytes,
        }

    def _queries(self, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[np.float32]]:
        shape = (len(self.lengths), self.index_n_heads, self.index_head_dim)
        if self.keys == "tied":
            values = rng.integers(-2, 3, shape).astype(np.float32)
            # Powers of two for weights: with c of index_query_quant left out, every score is exact.
            codes = reference.e4m3_encode(values) if self.cache_format == "fp8" else None
            weights = np.exp2(rng.integers(-2, 3, shape[:2])) * rng.choice([-1, 1], shape[:2])
            query = numbers_as(values, self.cache_format) if codes is None else codes
            return query, weights.astype(np.float32)
        return reference.index_query_quant(
            query=rng.standard_normal(shape).astype(np.float32),
            weights=rng.standard_normal(shape[:2]).astype(np.float32),
            cache_format=self.cache_format,
        )

    def _key_rows(self, rng: np.random.Generator, num_keys: int) -> NDArray[np.float32]:
        if self.keys == "tied":
            distinct = rng.integers(-3, 4, (5, self.index_head_dim))
            return distinct[rng.integers(0, 5, num_keys)].astype(np.float32)
        if self.keys == "close":
            common = rng.standard_normal(self.index_head_dim)
            return (common + rng.standard_normal((num_keys, self.index_head_dim)) * 2.0**-12).astype(np.float32)
        sizes = np.exp2(rng.uniform(-2, 2, (num_keys, 1)))
        return (rng.standard_normal((num_keys, self.index_head_dim)) * sizes).astype(np.float32)

    def _cache(
        self, rng: np.random.Generator, lengths: NDArray[np.int32], request_ids: NDArray[np.int32]
    ) -> tuple[NDArray[Any], NDArray[np.int32]]:
        num_requests = max(self.row_requests, default=-1) + 1
        contexts = np.zeros(max(num_requests, 1), np.int64)
        np.maximum.at(contexts, request_ids, np.maximum(lengths, 0))
        used = -(-contexts // self.block_size)
        num_blocks = int(used.sum()) + SPARE_BLOCKS
        free = rng.permutation(num_blocks).astype(np.int32)
        block_table = np.zeros((len(contexts), int(used.max()) + 1), np.int32)
        fill_with_invalid_ids(block_table, np.ones(block_table.shape, bool), num_blocks)
        cache = index_cache(num_blocks, self.block_size, self.index_head_dim, self.cache_format, self.gap_bytes)
        for request, context in enumerate(contexts):
            block_table[request, : used[request]], free = free[: used[request]], free[used[request] :]
            positions = np.arange(context)
            slots = reference.indexer.position_slots(positions, block_table[request], cache)
            keys = self._key_rows(rng, int(context))
            reference.index_key_write(key=keys, cache=cache, slot_mapping=slots, scale_format=self.scale_format)
        return cache, block_table


@dataclass(frozen=True)
class TopkCase:
    """Scores of every row with poison behind its length.

    Attributes:
        scores: "random"; "plateau": three values; "close": neighbouring floats; "special": zeros of both signs, NaN
            and infinities among numbers.
    """

    lengths: tuple[int, ...] = (300, 0, 1, 31, 32, 33, 299, -7)
    topk: int = 32
    scores: Scores = "random"
    block_size: int = 64
    width: int | None = None
    has_row_stride: bool = False
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of topk_slots."""
        rng = np.random.default_rng(self.seed)
        lengths = np.array(self.lengths, np.int32)
        width = max(0, 0, *self.lengths) + SPARE_COLUMNS if self.width is None else self.width
        num_tokens, max_blocks = len(lengths), -(-width // self.block_size) + 1
        num_blocks = max_blocks + SPARE_BLOCKS
        logits = self._scores(rng, (num_tokens, width))
        # What would win most easily: +inf, and NaN for comparisons that let it pass.
        behind = np.arange(width) >= lengths[:, None]
        logits[behind] = np.resize(np.array([np.inf, np.nan], np.float32), int(behind.sum()))
        block_table = np.stack([rng.permutation(num_blocks)[:max_blocks] for _ in range(max(num_tokens, 1))])
        block_table = block_table.astype(np.int32)
        used = -(-np.maximum(lengths, 0) // self.block_size)
        request_ids = rng.permutation(num_tokens).astype(np.int32)
        for row, request in enumerate(request_ids):
            fill_with_invalid_ids(block_table[request], np.arange(max_blocks) >= used[row], num_blocks)
        fill_with_invalid_ids(request_ids, lengths <= 0, len(block_table))
        return {
            "logits": with_row_stride(logits, padding=3) if self.has_row_stride else logits,
            "lengths": lengths,
            "block_table": block_table,
            "request_ids": request_ids,
            "topk": self.topk,
            "num_blocks": num_blocks,
            "block_size": self.block_size,
        }

    def _scores(self, rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
        if self.scores == "plateau":
            return rng.choice(np.array([-0.5, 0.25, 0.75], np.float32), shape)
        if self.scores == "close":
            around = np.float32(-3.0).view(np.int32)
            return (around + rng.integers(-8, 8, shape, dtype=np.int32)).view(np.float32)
        scores = rng.standard_normal(shape).astype(np.float32)
        if self.scores == "special":
            special = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-45, -1e-45], np.float32)
            chosen = rng.random(shape) < 0.7
            scores[chosen] = rng.choice(special, int(chosen.sum()))
        return scores
