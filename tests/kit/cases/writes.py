"""Cases of the ops that write latent and index caches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.kit.cases.common import (
    SPARE_BLOCKS,
    Arguments,
    Format,
    index_cache,
    latent_cache,
    numbers_as,
    rows_of_many_sizes,
    slot_mapping_with_invalid_ids,
)
from tests.kit.poison import with_row_stride


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
