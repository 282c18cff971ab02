"""What the configurations of all models have in common, and one frozen class for each kind of attention."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from fastdeploy_dsa.config.keys import ConfigError, UnsupportedConfigError
from fastdeploy_dsa.config.rope import RopeConfig
from fastdeploy_dsa.index_schedule import IndexSchedule
from fastdeploy_dsa.softmax_scale import SoftmaxScale

MlpType = Literal["dense", "sparse"]
RouterType = Literal["hash", "scores"]
"""Experts by the token's id, experts by the token's scores."""

LayerKind = Literal["mla", "dsa", "swa", "c4a", "c128a"]
"""Latent attention to everything, latent attention to a selection, a window of tokens, a window and a selection of
entries that stand for 4 tokens each, a window and all entries that stand for 128 tokens each."""

_Config = TypeVar("_Config", bound="ModelConfig")

RATIO_OF_KIND: Mapping[LayerKind, int] = {"swa": 1, "c4a": 4, "c128a": 128}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """What every model has; fields are named as in config.json.

    Attributes:
        q_lora_rank: 0 if queries are projected in one step.
        index_n_heads: 0 without an indexer, as index_head_dim and index_topk.
        scale: The softmax scale with its derivation.
        index_schedule: A letter for each layer that selects tokens or entries.
        eos_token_ids: Those of config.json, then those that generation_config.json adds.
        warnings: What the config leaves doubtful, one text each.
    """

    generation_obstacle: ClassVar[str] = ""
    """Why the engine cannot run such a model; empty if it can."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    qk_rope_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    scale: SoftmaxScale
    index_schedule: IndexSchedule
    num_nextn_predict_layers: int
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the relations between fields.

        Raises:
            ConfigError: Two fields do not fit together.
        """
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim: expected an even int, got {self.qk_rope_head_dim}")
        if self.index_topk:
            self._require_at_most("qk_rope_head_dim", "index_head_dim", self.index_head_dim)
        for key, token_ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for token_id in token_ids:
                if token_id is not None and token_id >= self.vocab_size:
                    raise ConfigError(f"{key}: expected less than vocab_size {self.vocab_size}, got {token_id}")

    @property
    def softmax_scale(self) -> float:
        return self.scale.value

    @property
    def num_layers(self) -> int:
        """Backbone and draft layers; the draft layers have the last ids."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @abstractmethod
    def layer_kind(self, layer: int) -> LayerKind:
        """Kind of attention of a backbone or draft layer."""

    @classmethod
    def from_pretrained(
        cls: type[_Config],
        path_or_dict: str | os.PathLike[str] | Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
    ) -> _Config:
        """Read and validate a config; warnings, schedule and softmax scale are logged.

        Args:
            path_or_dict: A checkpoint folder, its config.json, or the content of one.
            overrides: Values that replace those of the text config; None removes a key. `eos_token_id` also replaces
                what generation_config.json adds.

        Returns:
            The class of the model's attention. Called on a subclass: of that class or refused, so that
            `DsaConfig.from_pretrained` reads what the engine can run.

        Raises:
            ConfigError: A value is malformed or does not fit the others.
            UnsupportedConfigError: Another model, or a feature that is not supported.
            IndexScheduleError: The keys of the index schedule; see `resolve_index_schedule`.
            SoftmaxScaleError: The keys behind the softmax scale; see `resolve_softmax_scale`.
        """
        from fastdeploy_dsa.config.reading import read_config  # noqa: PLC0415 - it makes subclasses of this class

        config = read_config(path_or_dict, overrides)
        if not isinstance(config, cls):
            reason = config.generation_obstacle or f"expected a model of {cls.__name__}, got {type(config).__name__}"
            raise UnsupportedConfigError(f"{config.architecture}: {reason}")
        return config

    def _require_at_most(self, name: str, bound_name: str, bound: int) -> None:
        value = getattr(self, name)
        if value > bound:
            raise ConfigError(f"{name}: expected at most {bound_name} {bound}, got {value}")


@dataclass(frozen=True, kw_only=True)
class MlaConfig(ModelConfig):
    """Latent attention to the whole context: DeepSeek-V2 and V3. Their feed-forward layers are not read."""

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


@dataclass(frozen=True, kw_only=True)
class DsaConfig(MlaConfig):
    """Latent attention to selected tokens: DeepSeek-V3.2 and GLM-5, complete for the engine.

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


@dataclass(frozen=True, kw_only=True)
class CompressedConfig(ModelConfig):
    """A window of tokens and compressed entries: DeepSeek-V4, complete for the engine.

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
