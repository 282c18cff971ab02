"""What the caches of a model take and how much fits, from the tensors its backend declares. No paddle here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cache_manager import CachePool, WindowRoom, cache_bytes, most_blocks
from fastdeploy_dsa.cache_layout import CacheSpan, dsa_specs, mla_specs
from fastdeploy_dsa.compressed_cache_layout import (
    ENTRY_BLOCK_TOKENS,
    CompressedSizes,
    compressed_pools,
    compressed_spans,
    require_block_size,
)
from fastdeploy_dsa.config import RATIO_OF_KIND, CompressedConfig, DsaConfig, MlaConfig, ModelConfig
from fastdeploy_dsa.index_schedule import IndexSchedule
from fastdeploy_dsa.ops import CacheFormat

DEFAULT_BLOCK_SIZE = 64
DEFAULT_STEP_TOKENS = 512
"""Tokens of a step that the engine allocates for, unless the user asks for another number."""


def default_block_size(config: ModelConfig) -> int:
    """Tokens of a block of the main pool, unless the user asks for another size."""
    return ENTRY_BLOCK_TOKENS if isinstance(config, CompressedConfig) else DEFAULT_BLOCK_SIZE


def check_block_size(config: ModelConfig, block_size: int) -> None:
    """Check what the model's layers ask of a block.

    Raises:
        ValueError: A model with compressed entries, and a block that does not hold whole windows of one.
    """
    if isinstance(config, CompressedConfig):
        require_block_size(compressed_sizes(config), block_size)


@dataclass(frozen=True)
class CachePlan:
    """The caches of one device: all layers, or those of its pipeline stage.

    Attributes:
        layer_ids: Absolute ids, draft layers included.
        spans: The tensors.
        block_size: Tokens of a main block.
        pools: What spans name besides the main pool.
    """

    layer_ids: tuple[int, ...]
    spans: tuple[CacheSpan, ...]
    block_size: int
    pools: tuple[CachePool, ...] = ()

    @property
    def bytes_per_token(self) -> float:
        return sum(span.bytes_per_token * len(span.spec.layer_ids) for span in self.spans)

    @property
    def unpadded_bytes_per_token(self) -> float:
        return sum(span.unpadded_bytes_per_token * len(span.spec.layer_ids) for span in self.spans)

    def layer_bytes(self, layer: int) -> dict[str, float]:
        """Bytes per token in a layer by role; roles that hold a request's last tokens only count 0."""
        return {span.spec.role: span.bytes_per_token for span in self.spans if layer in span.spec.layer_ids}

    def request_bytes(self, num_tokens: int) -> int:
        """Bytes of the blocks that a request of so many tokens holds."""
        return sum(span.blocks(num_tokens) * span.spec.bytes_per_block_all_layers for span in self.spans)

    def allocated_bytes(self, num_requests: int, num_tokens: int) -> int:
        """Bytes that the engine allocates for so many requests of so many tokens, prefixes cached."""
        num_blocks = num_requests * -(-num_tokens // self.block_size)
        room = WindowRoom(num_requests, num_step_tokens=max(DEFAULT_STEP_TOKENS, num_requests))
        return cache_bytes([span.spec for span in self.spans], num_blocks, room.device_blocks(self.pools, num_blocks))

    def max_requests(self, memory_bytes: int, num_tokens: int) -> int | None:
        """Requests of so many tokens that fit; None: no layer here has a cache."""
        least = self.request_bytes(num_tokens)
        if not least:
            return None
        return most_blocks(
            memory_bytes, memory_bytes // least + 1, lambda count: self.allocated_bytes(count, num_tokens)
        )

    def max_tokens(self, memory_bytes: int) -> int | None:
        """Tokens of the longest request that fits; None: memory sets no limit."""
        if not self.bytes_per_token:
            return None
        too_many = 2 * math.ceil(memory_bytes / self.bytes_per_token) + 1
        return most_blocks(memory_bytes, too_many, lambda count: self.allocated_bytes(1, count))


def plan_cache(
    config: ModelConfig,
    *,
    cache_format: CacheFormat,
    block_size: int | None = None,
    layer_ids: tuple[int, ...] | None = None,
) -> CachePlan:
    """The caches of these layers.

    Args:
        config: The model.
        cache_format: Of the caches.
        block_size: Tokens of a main block; None: default_block_size.
        layer_ids: Absolute ids; None: all, draft layers included.

    Raises:
        ValueError: A size that does not fit the format.
    """
    layers = tuple(range(config.num_layers)) if layer_ids is None else layer_ids
    tokens = default_block_size(config) if block_size is None else block_size
    spans = _spans(config, cache_format, tokens, layers)
    pools = compressed_pools(compressed_sizes(config)) if isinstance(config, CompressedConfig) else ()
    used = {span.spec.pool for span in spans}
    return CachePlan(layers, spans, tokens, tuple(pool for pool in pools if pool.name in used))


def plan_stages(
    config: ModelConfig, starts: tuple[int, ...], *, cache_format: CacheFormat, block_size: int | None = None
) -> tuple[CachePlan, ...]:
    """A plan for each pipeline stage; the draft layers are with the last one."""
    ends = (*starts[1:], config.num_layers)
    return tuple(
        plan_cache(config, cache_format=cache_format, block_size=block_size, layer_ids=tuple(range(start, end)))
        for start, end in zip(starts, ends, strict=True)
    )


def without_sharing(config: ModelConfig) -> ModelConfig:
    """The same model with every layer full."""
    schedule = config.index_schedule
    return replace(config, index_schedule=IndexSchedule("F" * len(schedule.letters), layer_ids=schedule.layer_ids))


def compressed_sizes(config: CompressedConfig) -> CompressedSizes:
    """What the layouts of a compressed model depend on."""
    ratios = tuple((layer, RATIO_OF_KIND[config.layer_kind(layer)]) for layer in range(config.num_layers))
    return CompressedSizes(
        head_dim=config.head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        index_head_dim=config.index_head_dim,
        sliding_window=config.sliding_window,
        ratios=ratios,
        selecting_layers=config.index_schedule.full_layers,
    )


def _spans(
    config: ModelConfig, cache_format: CacheFormat, block_size: int, layer_ids: tuple[int, ...]
) -> tuple[CacheSpan, ...]:
    if isinstance(config, CompressedConfig):
        sizes = compressed_sizes(config)
        return compressed_spans(sizes, cache_format=cache_format, layer_ids=layer_ids, block_size=block_size)
    if isinstance(config, DsaConfig):
        specs = dsa_specs(
            cache_format=cache_format,
            kv_lora_rank=config.kv_lora_rank,
            qk_rope_head_dim=config.qk_rope_head_dim,
            index_head_dim=config.index_head_dim,
            index_schedule=config.index_schedule,
            layer_ids=layer_ids,
            block_size=block_size,
        )
    elif isinstance(config, MlaConfig):
        specs = mla_specs(
            cache_format=cache_format,
            kv_lora_rank=config.kv_lora_rank,
            qk_rope_head_dim=config.qk_rope_head_dim,
            layer_ids=layer_ids,
            block_size=block_size,
        )
    else:
        raise TypeError(f"config: expected a model with a known cache, got {type(config).__name__}")
    return tuple(CacheSpan(spec, block_size, spec.bytes_per_block) for spec in specs if spec.layer_ids)
