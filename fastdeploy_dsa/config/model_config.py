"""What the configurations of all models have in common; each kind of attention has a subclass in a file of its own."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from fastdeploy_dsa.config.families import AttentionFamily, recognise
from fastdeploy_dsa.config.keys import ConfigError, ConfigKeys, UnsupportedConfigError
from fastdeploy_dsa.config.source import ConfigSource, read_source
from fastdeploy_dsa.index_schedule import IndexSchedule
from fastdeploy_dsa.softmax_scale import SoftmaxScale
from fastdeploy_dsa.wording import nearest, shown

LayerKind = Literal["mla", "dsa", "swa", "c4a", "c128a"]
"""Latent attention to everything, latent attention to a selection, a window of tokens, a window and a selection of
entries that stand for 4 tokens each, a window and all entries that stand for 128 tokens each."""

_Config = TypeVar("_Config", bound="ModelConfig")

# Keys of other sparse-attention dialects and their values for "not in use". Ignored, they give plausible wrong text.
_FOREIGN_KEYS: Mapping[str, tuple[object, ...]] = {
    "index_kpool": (0, 1),
    "index_kpool_always_select_tail": (False,),
    "index_kpool_compress": (False,),
    "index_init_tokens": (0,),
    "index_local_tokens": (0,),
    "cli_factor": (0, 1),
    "candidate_source_layer_id": (),
    "kv_source_layer_ids": (),
    "index_source_layer_ids": (),
}
# Keys with one supported value; absent means that value.
_FIXED_KEYS: Mapping[str, object] = {"attention_bias": False, "rope_interleave": True, "compression_config": None}

logger = logging.getLogger(__name__)


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

    _class_of_family: ClassVar[dict[AttentionFamily, type[ModelConfig]]] = {}
    """Filled by the subclasses: importing the package imports them all, and this file none."""

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

    def __init_subclass__(cls, *, family: AttentionFamily) -> None:
        """Take the class for the models of a family."""
        super().__init_subclass__()
        ModelConfig._class_of_family[family] = cls

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
    @abstractmethod
    def from_keys(cls, keys: ConfigKeys, named: Mapping[str, Any]) -> ModelConfig:
        """Read what the family has of a config.

        Args:
            keys: The text config, overrides applied.
            named: The fields that do not depend on the family: names of the model, end tokens.

        Raises:
            ValueError: As from_pretrained.
        """

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
        source = read_source(path_or_dict, overrides)
        with source.named_in_errors():
            config = cls._of_source(source)
        if not isinstance(config, cls):
            reason = config.generation_obstacle or f"expected a model of {cls.__name__}, got {type(config).__name__}"
            raise UnsupportedConfigError(f"{config.architecture}: {reason}")
        return config

    @staticmethod
    def _of_source(source: ConfigSource) -> ModelConfig:
        keys = source.keys()
        model = recognise(keys, source.content)
        for key, unused_values in _FOREIGN_KEYS.items():
            if key in keys and keys[key] not in unused_values:
                raise UnsupportedConfigError(
                    f"{key}: this kind of sparse attention is not supported, got {shown(keys[key])}"
                )
        keys.require_fixed(_FIXED_KEYS)
        named: dict[str, Any] = {"architecture": model.architecture, "model_type": model.model_type}
        named["eos_token_ids"] = source.eos_token_ids(keys)
        config = ModelConfig._class_of_family[model.family].from_keys(keys, named)
        for key in source.overrides:
            if key not in keys.asked:
                near = nearest(key, keys.asked)
                raise ConfigError(f"overrides: unknown key {shown(key)}, the nearest known one is {near!r}")
        config._log()
        return config

    def _log(self) -> None:
        for warning in self.warnings:
            logger.warning("config: %s", warning)
        if self.index_schedule.letters:
            logger.info("index schedule: %s", self.index_schedule.describe())
        logger.info("softmax scale: %s", self.scale.describe())

    def _require_at_most(self, name: str, bound_name: str, bound: int) -> None:
        value = getattr(self, name)
        if value > bound:
            raise ConfigError(f"{name}: expected at most {bound_name} {bound}, got {value}")
