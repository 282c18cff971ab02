"""Latent attention to the whole context: DeepSeek-V2 and V3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastdeploy_dsa.config.fields import NO_INDEXER, common_fields, latent_fields
from fastdeploy_dsa.config.keys import ConfigError, ConfigKeys
from fastdeploy_dsa.config.model_config import LayerKind, ModelConfig
from fastdeploy_dsa.config.rope import RopeConfig, read_rope
from fastdeploy_dsa.index_schedule import IndexSchedule
from fastdeploy_dsa.softmax_scale import resolve_softmax_scale
from fastdeploy_dsa.wording import shown

_INDEXER_KEYS = (
    *("index_n_heads", "index_head_dim", "index_topk", "indexer_rope_interleave", "index_share_for_mtp_iteration"),
    *("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset", "use_index_cache"),
)

# What models have whose attention alone is read: their other keys may be overridden, without effect here.
_UNREAD_KEYS = (
    *("hidden_act", "intermediate_size", "moe_intermediate_size", "first_k_dense_replace", "mlp_layer_types"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob"),
    *("routed_scaling_factor", "scoring_func", "topk_method", "moe_layer_freq", "quantization_config"),
    *("num_key_value_heads", "head_dim"),
)


@dataclass(frozen=True, kw_only=True)
class MlaConfig(ModelConfig, family="mla"):
    """Latent attention to the whole context; feed-forward layers are not read."""

    generation_obstacle: ClassVar[str] = "models without an indexer cannot generate yet"

    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    rope: RopeConfig

    @property
    def qk_head_dim(self) -> int:
        """Width of the un-absorbed query-key head; `head_dim` of the file is something else."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def layer_kind(self, layer: int) -> LayerKind:
        return "mla"

    @classmethod
    def from_keys(cls, keys: ConfigKeys, named: Mapping[str, Any]) -> MlaConfig:
        for key in _INDEXER_KEYS:
            if key in keys:
                raise ConfigError(f"{key}: {named['architecture']} has no indexer, got {shown(keys[key])}")
        rope, warnings = read_rope(keys)
        config = cls(
            **named,
            **common_fields(keys, IndexSchedule(""), warnings, resolve_softmax_scale(keys)),
            **latent_fields(keys),
            **NO_INDEXER,
            q_lora_rank=keys.integer("q_lora_rank", minimum=0, default=0),
            rope=rope,
        )
        keys.asked.update(_UNREAD_KEYS)
        return config
