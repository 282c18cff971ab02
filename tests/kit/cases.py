"""Cases of every op: frozen descriptions from which arguments are built, the same for every implementation.

`arguments()` returns fresh arrays that depend on the fields only. Whatever an op must not read is poison: spare slots
and blocks, gaps between blocks, columns behind a row's length, ids behind a row's count. The unused ends of block
tables hold invalid ids. A case prints as its fields, seed included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference.caches import SCALE_BYTES, LatentFields
from tests.kit.poison import fill_with_invalid_ids, invalid_ids, poisoned_blocks, with_row_stride

Arguments = dict[str, Any]
Format = Literal["fp8", "bfloat16", "float32"]
Keys = Literal["random", "tied", "close"]
Scores = Literal["random", "plateau", "close", "special"]

DTYPES: dict[str, DTypeLike] = {"fp8": np.uint8, "bfloat16": np.uint16, "float32": np.float32}
SPARE_BLOCKS = 3
SPARE_COLUMNS = 5


def numbers_as(values: NDArray[np.float32], input_format: str) -> NDArray[Any]:
    """Float32 numbers in an input format."""
    return reference.bf16_encode(values) if input_format == "bfloat16" else values.astype(np.float32)


def rows_of_many_sizes(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Normal numbers whose rows differ in size by up to 2^12, as scales must follow."""
    sizes = np.exp2(rng.uniform(-6, 6, (*shape[:-1], 1)))
    return (rng.standard_normal(shape) * sizes).astype(np.float32)


def latent_cache(
    num_blocks: int, block_size: int, kv_lora_rank: int, qk_rope_head_dim: int, cache_format: str, gap_bytes: int = 0
) -> NDArray[Any]:
    """A poisoned latent cache [num_blocks, 1, block_size, row]."""
    width = kv_lora_rank + qk_rope_head_dim
    if cache_format == "fp8":
        width = LatentFields(kv_lora_rank, qk_rope_head_dim).row_bytes
    return poisoned_blocks(num_blocks, (1, block_size, width), DTYPES[cache_format], gap_bytes=gap_bytes)


def index_cache(
    num_blocks: int, block_size: int, index_head_dim: int, cache_format: str, gap_bytes: int = 0
) -> NDArray[Any]:
    """A poisoned index cache [num_blocks, block_size, index_head_dim and, for fp8, scale]."""
    width = index_head_dim + (SCALE_BYTES if cache_format == "fp8" else 0)
    return poisoned_blocks(num_blocks, (block_size, width), DTYPES[cache_format], gap_bytes=gap_bytes)


def slot_mapping_with_invalid_ids(rng: np.random.Generator, num_tokens: int, num_slots: int) -> NDArray[np.int64]:
    """Distinct slots in random order; every fifth is an id outside the cache."""
    slots = rng.permutation(num_slots)[:num_tokens].astype(np.int64)
    fill_with_invalid_ids(slots, np.arange(num_tokens) % 5 == 3, num_slots)
    return slots


@dataclass(frozen=True)
class MlaCacheWriteCase:
    """Rows that go to scattered slots of a poisoned latent cache."""

    num_tokens: int = 41
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    block_size: int = 64
    input_format: str = "float32"
    cache_format: str = "fp8"
    scale_format: str = "ue8m0"
    gap_bytes: int = 0
    has_row_strides: bool = False
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of mla_cache_write."""
        rng = np.random.default_rng(self.seed)
        num_blocks = -(-self.num_tokens // self.block_size) + SPARE_BLOCKS
        latent = numbers_as(rows_of_many_sizes(rng, (self.num_tokens, self.kv_lora_rank)), self.input_format)
        rope = numbers_as(rows_of_many_sizes(rng, (self.num_tokens, self.qk_rope_head_dim)), self.input_format)
        if self.has_row_strides:
            latent, rope = with_row_stride(latent), with_row_stride(rope, padding=3)
        return {
            "latent": latent,
            "rope": rope,
            "cache": latent_cache(
                num_blocks,
                self.block_size,
                self.kv_lora_rank,
                self.qk_rope_head_dim,
                self.cache_format,
                self.gap_bytes,
            ),
            "slot_mapping": slot_mapping_with_invalid_ids(rng, self.num_tokens, num_blocks * self.block_size),
            "scale_format": self.scale_format,
        }


@dataclass(frozen=True)
class IndexKeyWriteCase:
    """Keys that go to scattered slots of a poisoned index cache."""

    num_tokens: int = 41
    index_head_dim: int = 128
    block_size: int = 64
    input_format: str = "float32"
    cache_format: str = "fp8"
    scale_format: str = "ue8m0"
    gap_bytes: int = 0
    has_row_strides: bool = False
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of index_key_write."""
        rng = np.random.default_rng(self.seed)
        num_blocks = -(-self.num_tokens // self.block_size) + SPARE_BLOCKS
        key = numbers_as(rows_of_many_sizes(rng, (self.num_tokens, self.index_head_dim)), self.input_format)
        return {
            "key": with_row_stride(key) if self.has_row_strides else key,
            "cache": index_cache(num_blocks, self.block_size, self.index_head_dim, self.cache_format, self.gap_bytes),
            "slot_mapping": slot_mapping_with_invalid_ids(rng, self.num_tokens, num_blocks * self.block_size),
            "scale_format": self.scale_format,
        }


@dataclass(frozen=True)
class IndexQueryQuantCase:
    """Index queries of many sizes with weights of both signs."""

    num_tokens: int = 13
    index_n_heads: int = 64
    index_head_dim: int = 128
    input_format: str = "float32"
    cache_format: Format = "fp8"
    has_row_strides: bool = False
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of index_query_quant."""
        rng = np.random.default_rng(self.seed)
        shape = (self.num_tokens, self.index_n_heads, self.index_head_dim)
        query = numbers_as(rows_of_many_sizes(rng, shape), self.input_format)
        weights = rng.standard_normal(shape[:2]).astype(np.float32)
        if self.has_row_strides:
            query, weights = with_row_stride(query), with_row_stride(weights, padding=1)
        return {"query": query, "weights": weights, "cache_format": self.cache_format}


@dataclass(frozen=True)
class LayerWriteCase:
    """The rows of one layer, which go to the same scattered slots of both caches."""

    num_tokens: int = 41
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    index_n_heads: int = 64
    index_head_dim: int = 128
    block_size: int = 64
    input_format: str = "bfloat16"
    latent_format: Format = "fp8"
    index_format: Format = "fp8"
    scale_format: str = "ue8m0"
    gap_bytes: int = 0
    has_row_strides: bool = False
    seed: int = 0

    def parts(self) -> tuple[Arguments, Arguments, Arguments]:
        """Arguments of mla_cache_write, index_key_write and index_query_quant."""
        common = {name: getattr(self, name) for name in ("num_tokens", "input_format", "has_row_strides", "seed")}
        caches = {name: getattr(self, name) for name in ("block_size", "scale_format", "gap_bytes")}
        latent = MlaCacheWriteCase(
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            cache_format=self.latent_format,
            **common,
            **caches,
        )
        key = IndexKeyWriteCase(index_head_dim=self.index_head_dim, cache_format=self.index_format, **common, **caches)
        query = IndexQueryQuantCase(
            index_n_heads=self.index_n_heads,
            index_head_dim=self.index_head_dim,
            cache_format=self.index_format,
            **common,
        )
        parts = latent.arguments(), key.arguments(), query.arguments()
        parts[1]["slot_mapping"] = parts[0]["slot_mapping"]
        return parts

    def arguments(self) -> Arguments:
        """Of layer_write."""
        latent, key, query = self.parts()
        return {
            **{name: latent[name] for name in ("latent", "rope", "slot_mapping", "scale_format")},
            **{name: query[name] for name in ("query", "weights")},
            "latent_cache": latent["cache"],
            "key": key["key"],
            "index_cache": key["cache"],
        }


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


@dataclass(frozen=True)
class SparseMlaCase:
    """Query rows over selected slots of a latent cache in which only selected slots are written.

    Attributes:
        counts: Leading ids of every row; ids behind it name poisoned slots. None: all ids count.
        invalid_every: Every so manieth id lies outside the cache; 0: none.
        logit_size: Standard deviation of the attention logits; large ones make one key dominate.
    """

    num_tokens: int = 3
    num_heads: int = 16
    topk: int = 70
    counts: tuple[int, ...] | None = None
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    block_size: int = 64
    query_format: Literal["bfloat16", "float32"] = "float32"
    cache_format: Format = "fp8"
    scale_format: Literal["ue8m0", "plain"] = "ue8m0"
    gap_bytes: int = 0
    invalid_every: int = 7
    logit_size: float = 1.0
    num_slots: int | None = None
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of sparse_mla."""
        rng = np.random.default_rng(self.seed)
        width = self.kv_lora_rank + self.qk_rope_head_dim
        num_slots = 2 * self.topk if self.num_slots is None else self.num_slots
        num_blocks = -(-num_slots // self.block_size) + SPARE_BLOCKS
        cache = latent_cache(
            num_blocks, self.block_size, self.kv_lora_rank, self.qk_rope_head_dim, self.cache_format, self.gap_bytes
        )
        slot_ids, readable = self._slot_ids(rng, num_blocks * self.block_size)
        values = rng.standard_normal((len(readable), width)).astype(np.float32)
        reference.mla_cache_write(
            latent=values[:, : self.kv_lora_rank],
            rope=values[:, self.kv_lora_rank :],
            cache=cache,
            slot_mapping=readable,
            scale_format=self.scale_format,
        )
        query = rng.standard_normal((self.num_tokens, self.num_heads, width)).astype(np.float32)
        return {
            "query": numbers_as(query, self.query_format),
            "latent_cache": cache,
            "slot_ids": slot_ids,
            "counts": None if self.counts is None else np.array(self.counts, np.int32),
            "kv_lora_rank": self.kv_lora_rank,
            "softmax_scale": self.logit_size * width**-0.5,
        }

    def _slot_ids(self, rng: np.random.Generator, num_slots: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids [num_tokens, topk] and the slots that may be read."""
        order = rng.permutation(num_slots)
        readable, poisoned = order[: num_slots // 2], order[num_slots // 2 :]
        picks = rng.integers(0, len(readable), (self.num_tokens, self.topk))
        slot_ids = readable[picks].astype(np.int32)
        if self.invalid_every:
            is_invalid = np.broadcast_to(np.arange(self.topk) % self.invalid_every == 2, slot_ids.shape)
            fill_with_invalid_ids(slot_ids, is_invalid, num_slots)
        if self.counts is not None:
            behind = np.arange(self.topk) >= np.array(self.counts)[:, None]
            slot_ids[behind] = np.resize(poisoned, int(behind.sum()))
        return slot_ids, readable.astype(np.int64)


@dataclass(frozen=True)
class BlockCopyCase:
    """Blocks that move between two arenas whose blocks lie differently far apart."""

    num_copies: int = 5
    block_shape: tuple[int, ...] = (64, 132)
    dtype: str = "uint8"
    src_gap_bytes: int = 0
    dst_gap_bytes: int = 0
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of block_copy."""
        rng = np.random.default_rng(self.seed)
        src_blocks, dst_blocks = self.num_copies + SPARE_BLOCKS, self.num_copies + 2 * SPARE_BLOCKS
        src = poisoned_blocks(src_blocks, self.block_shape, self.dtype, gap_bytes=self.src_gap_bytes)
        dst = poisoned_blocks(dst_blocks, self.block_shape, self.dtype, gap_bytes=self.dst_gap_bytes)
        numbers = rng.integers(0, 256, (src_blocks, src[0].nbytes), dtype=np.uint8)
        src[...] = numbers.view(self.dtype).reshape(src.shape)
        return {
            "src": src,
            "dst": dst,
            "src_block_ids": rng.permutation(src_blocks)[: self.num_copies].astype(np.int64),
            "dst_block_ids": rng.permutation(dst_blocks)[: self.num_copies].astype(np.int64),
        }


def rejected_block_ids(num_blocks: int) -> list[int]:
    """Block ids that block_copy refuses."""
    return invalid_ids(num_blocks, np.int64)
