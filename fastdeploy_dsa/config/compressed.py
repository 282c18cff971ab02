"""Attention to a window of tokens and to compressed entries: DeepSeek-V4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastdeploy_dsa.config.compressed_experts import RouterType, read_compressed_experts
from fastdeploy_dsa.config.compressed_layers import RATIO_OF_KIND, read_layer_kinds
from fastdeploy_dsa.config.fields import (
    NO_INDEXER,
    common_fields,
    indexer_fields,
    pattern_warnings,
    read_weight_block_size,
)
from fastdeploy_dsa.config.keys import MAX_LAYERS, MAX_POSITIONS, ConfigError, ConfigKeys
from fastdeploy_dsa.config.model_config import LayerKind, ModelConfig
from fastdeploy_dsa.config.rope import RopeConfig, read_rope_pair
from fastdeploy_dsa.index_schedule import resolve_index_schedule
from fastdeploy_dsa.softmax_scale import compressed_softmax_scale


@dataclass(frozen=True, kw_only=True)
class CompressedConfig(ModelConfig, family="compressed"):
    """A window of tokens and compressed entries, complete for the engine.

    Attributes:
        layer_kinds: One per backbone layer; draft layers see the window only.
        main_rope: Rotation of window-only layers.
        compress_rope: Rotation of everything in layers with compressed entries, their window rows included.
        router_types: One per backbone layer; draft layers choose by scores.
        swiglu_limit: Bound of what the routed experts' gate is made from; 0: there is none.
        hc_mult: Residual streams.
        hc_sinkhorn_iters: Rounds that make the streams' mixing doubly stochastic.
        weight_block_size: Rows and columns that share a scale in an fp8 checkpoint.
    """

    head_dim: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    layer_kinds: tuple[LayerKind, ...]
    main_rope: RopeConfig
    compress_rope: RopeConfig
    moe_intermediate_size: int
    router_types: tuple[RouterType, ...]
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    weight_block_size: tuple[int, int] | None

    def __post_init__(self) -> None:
        """As ModelConfig, the head's parts and the experts."""
        super().__post_init__()
        self._require_at_most("qk_rope_head_dim", "head_dim", self.head_dim)
        self._require_at_most("num_experts_per_tok", "n_routed_experts", self.n_routed_experts)
        if self.num_attention_heads % self.o_groups:
            raise ConfigError(
                f"num_attention_heads: expected a multiple of o_groups {self.o_groups}, got {self.num_attention_heads}"
            )

    def layer_kind(self, layer: int) -> LayerKind:
        return self.layer_kinds[layer] if layer < self.num_hidden_layers else "swa"

    def ratio(self, layer: int) -> int:
        """Tokens that an entry of the layer stands for; 1: it has none."""
        return RATIO_OF_KIND[self.layer_kind(layer)]

    def owns_indexer(self, layer: int) -> bool:
        """Whether a layer selects entries by itself."""
        return self.layer_kind(layer) == "c4a" and self.index_schedule.is_full(layer)

    def router_type(self, layer: int) -> RouterType:
        """How a backbone or draft layer chooses its experts."""
        return self.router_types[layer] if layer < self.num_hidden_layers else "scores"

    @classmethod
    def from_keys(cls, keys: ConfigKeys, named: Mapping[str, Any]) -> CompressedConfig:
        keys.require_fixed({"num_key_value_heads": 1})
        kinds = read_layer_kinds(keys, keys.integer("num_hidden_layers", MAX_LAYERS))
        selecting = tuple(layer for layer, kind in enumerate(kinds) if kind == "c4a")
        schedule = resolve_index_schedule(keys, len(kinds), layer_ids=selecting)
        common = common_fields(keys, schedule, (), compressed_softmax_scale(keys))
        main_rope, compress_rope, rope_warnings = read_rope_pair(keys)
        common["warnings"] += rope_warnings
        config = cls(
            **named,
            **common,
            **(indexer_fields(keys) if selecting else NO_INDEXER),
            q_lora_rank=keys.integer("q_lora_rank"),
            head_dim=keys.integer("head_dim"),
            o_groups=keys.integer("o_groups"),
            o_lora_rank=keys.integer("o_lora_rank"),
            sliding_window=keys.integer("sliding_window", MAX_POSITIONS),
            layer_kinds=kinds,
            main_rope=main_rope,
            compress_rope=compress_rope,
            weight_block_size=read_weight_block_size(keys),
            **read_compressed_experts(keys, len(kinds)),
        )
        return replace(config, warnings=(*config.warnings, *pattern_warnings(keys, config)))
