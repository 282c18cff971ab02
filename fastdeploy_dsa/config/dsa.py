"""Latent attention to selected tokens: DeepSeek-V3.2 and GLM-5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from fastdeploy_dsa.config.fields import (
    common_fields,
    indexer_fields,
    latent_fields,
    pattern_warnings,
    read_weight_block_size,
)
from fastdeploy_dsa.config.keys import MAX_EXPERTS, MAX_LAYERS, REQUIRED, ConfigError, ConfigKeys
from fastdeploy_dsa.config.mla import MlaConfig
from fastdeploy_dsa.config.model_config import LayerKind
from fastdeploy_dsa.config.rope import read_rope
from fastdeploy_dsa.index_schedule import resolve_index_schedule
from fastdeploy_dsa.softmax_scale import resolve_softmax_scale

MlpType = Literal["dense", "sparse"]

_INDEXED_LAYER_TYPES = ("indexed_attention", "deepseek_sparse_attention")

_FIXED_FEED_FORWARD_KEYS: Mapping[str, object] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


@dataclass(frozen=True, kw_only=True)
class DsaConfig(MlaConfig, family="dsa"):
    """Latent attention to selected tokens, complete for the engine.

    Attributes:
        mlp_layer_types: One entry per backbone layer.
        n_routed_experts: 0 if every layer is dense; the other expert numbers are then 0 too.
        weight_block_size: Rows and columns that share a scale in an fp8 checkpoint.
    """

    generation_obstacle: ClassVar[str] = ""

    indexer_rope_interleave: bool
    index_share_for_mtp_iteration: bool
    intermediate_size: int
    moe_intermediate_size: int
    mlp_layer_types: tuple[MlpType, ...]
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    hidden_act: str
    attention_bias: bool
    weight_block_size: tuple[int, int] | None

    def __post_init__(self) -> None:
        """As ModelConfig, and the experts."""
        super().__post_init__()
        if self.n_routed_experts:
            self._check_experts()
        elif "sparse" in self.mlp_layer_types:
            layer = self.mlp_layer_types.index("sparse")
            raise ConfigError(f"mlp_layer_types: layer {layer} is sparse, but n_routed_experts is absent")

    @property
    def mtp_mlp_type(self) -> MlpType:
        """Kind of the MTP layers, which mlp_layer_types does not list."""
        return "sparse" if self.n_routed_experts else "dense"

    def mlp_type(self, layer: int) -> MlpType:
        """Kind of feed-forward of a backbone or draft layer."""
        return self.mlp_layer_types[layer] if layer < self.num_hidden_layers else self.mtp_mlp_type

    def owns_indexer(self, layer: int) -> bool:
        """Whether a layer selects by itself: a full layer of the schedule, or a draft layer."""
        return layer >= self.num_hidden_layers or self.index_schedule.is_full(layer)

    def layer_kind(self, layer: int) -> LayerKind:
        return "dsa"

    def _check_experts(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups:
            raise ConfigError(f"n_routed_experts: expected a multiple of n_group {groups}, got {experts}")
        if groups > 1 and experts < 2 * groups:  # a group's score is the sum of its two best experts
            raise ConfigError(
                f"n_group: expected at least two experts per group, got {groups} groups of {experts} experts"
            )
        self._require_at_most("topk_group", "n_group", groups)
        kept = self.topk_group * (experts // groups)
        self._require_at_most("num_experts_per_tok", "the experts in the kept groups", kept)

    @classmethod
    def from_keys(cls, keys: ConfigKeys, named: Mapping[str, Any]) -> DsaConfig:
        keys.require_fixed(_FIXED_FEED_FORWARD_KEYS)
        num_layers = keys.integer("num_hidden_layers", MAX_LAYERS)
        schedule = resolve_index_schedule(keys, num_layers)
        common = common_fields(keys, schedule, (), resolve_softmax_scale(keys))
        rope, rope_warnings = read_rope(keys)
        common["warnings"] += rope_warnings
        n_routed_experts = keys.integer("n_routed_experts", MAX_EXPERTS, minimum=0, default=0)
        has_experts = n_routed_experts > 0
        absent: Any = REQUIRED if has_experts else 0
        least = int(has_experts)
        config = cls(
            **named,
            **common,
            **latent_fields(keys),
            **indexer_fields(keys),
            q_lora_rank=keys.integer("q_lora_rank"),
            rope=rope,
            indexer_rope_interleave=keys.boolean("indexer_rope_interleave", default=False),
            index_share_for_mtp_iteration=keys.boolean("index_share_for_mtp_iteration", default=False),
            intermediate_size=keys.integer("intermediate_size"),
            moe_intermediate_size=keys.integer("moe_intermediate_size", minimum=least, default=absent),
            mlp_layer_types=_mlp_layer_types(keys, num_layers, has_experts),
            n_routed_experts=n_routed_experts,
            n_shared_experts=keys.integer("n_shared_experts", MAX_EXPERTS, minimum=0, default=absent),
            num_experts_per_tok=keys.integer("num_experts_per_tok", MAX_EXPERTS, minimum=least, default=absent),
            n_group=keys.integer("n_group", MAX_EXPERTS, minimum=least, default=absent),
            topk_group=keys.integer("topk_group", MAX_EXPERTS, minimum=least, default=absent),
            norm_topk_prob=keys.boolean("norm_topk_prob", default=True),
            routed_scaling_factor=keys.number("routed_scaling_factor", absent if has_experts else 1.0),
            hidden_act="silu",
            attention_bias=False,
            weight_block_size=read_weight_block_size(keys),
        )
        if "layer_types" in keys:  # says again what the architecture says
            keys.entries("layer_types", _INDEXED_LAYER_TYPES, num_layers)
        return replace(config, warnings=(*config.warnings, *pattern_warnings(keys, config)))


def _mlp_layer_types(keys: ConfigKeys, num_layers: int, has_experts: bool) -> tuple[MlpType, ...]:
    counted: tuple[MlpType, ...] = ()
    if "first_k_dense_replace" in keys or not has_experts:
        num_dense = keys.integer("first_k_dense_replace", MAX_LAYERS, minimum=0) if has_experts else num_layers
        counted = tuple("dense" if layer < num_dense else "sparse" for layer in range(num_layers))
    if "mlp_layer_types" not in keys:
        if not counted:
            raise ConfigError("first_k_dense_replace, mlp_layer_types: both missing, but the model has experts")
        return counted
    listed: tuple[MlpType, ...] = tuple(keys.entries("mlp_layer_types", get_args(MlpType), num_layers))
    if not has_experts:
        return listed  # the fields' relations are checked with the experts
    for layer, (kind, counted_kind) in enumerate(zip(listed, counted or listed, strict=True)):
        if kind != counted_kind:
            raise ConfigError(
                f"mlp_layer_types, first_k_dense_replace: layer {layer} is {kind} in the list"
                f" and {counted_kind} with first_k_dense_replace {keys['first_k_dense_replace']}"
            )
    return listed
