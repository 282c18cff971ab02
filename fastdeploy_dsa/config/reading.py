"""From the content of a config.json to a `ModelConfig`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from fastdeploy_dsa.config.compressed_experts import read_compressed_experts
from fastdeploy_dsa.config.compressed_layers import read_layer_kinds
from fastdeploy_dsa.config.families import recognise
from fastdeploy_dsa.config.keys import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB_SIZE,
    MAX_WIDTH,
    REQUIRED,
    ConfigError,
    ConfigKeys,
    UnsupportedConfigError,
)
from fastdeploy_dsa.config.model_config import CompressedConfig, DsaConfig, MlaConfig, MlpType, ModelConfig
from fastdeploy_dsa.config.rope import read_rope, read_rope_pair
from fastdeploy_dsa.index_pattern import pattern_doubts
from fastdeploy_dsa.index_schedule import IndexSchedule, IndexScheduleError, resolve_index_schedule
from fastdeploy_dsa.softmax_scale import SoftmaxScale, compressed_softmax_scale, resolve_softmax_scale
from fastdeploy_dsa.strict_json import read_json_object, require_shallow
from fastdeploy_dsa.wording import nearest, shown

_DTYPES = ("bfloat16", "float16", "float32")
_INDEXED_LAYER_TYPES = ("indexed_attention", "deepseek_sparse_attention")

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
_FIXED_FEED_FORWARD_KEYS: Mapping[str, object] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_FIXED_QUANTIZATION_KEYS: Mapping[str, object] = {"fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
# A tensor's dtype says how it is stored, and what is stored as fp8 is always dequantized.
_QUANTIZATION_KEYS_WITHOUT_EFFECT = ("modules_to_not_convert", "dequantize", "expert_dtype")
_ENVELOPE_KEYS = ("quantization_config", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings")

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

logger = logging.getLogger(__name__)


def read_config(
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None
) -> ModelConfig:
    """As `ModelConfig.from_pretrained`, of any model."""
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"overrides: expected a mapping, got {shown(overrides)}")
    _require_shallow("overrides", overrides)
    if isinstance(path_or_dict, Mapping):
        _require_shallow("path_or_dict", path_or_dict)
        return _config_of(path_or_dict, {}, overrides)
    if not isinstance(path_or_dict, str | os.PathLike):
        raise ConfigError(f"path_or_dict: expected a path or a mapping, got {type(path_or_dict).__name__}")
    path = Path(path_or_dict)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise ConfigError(f"{path}: expected a file, got a folder" if path.is_dir() else f"{path}: no such file")
    generation_path = path.with_name("generation_config.json")
    content = read_json_object(path, ConfigError)
    generation = read_json_object(generation_path, ConfigError) if generation_path.is_file() else {}
    try:
        return _config_of(content, generation, overrides)
    except ConfigError as reason:
        source = f"{path} with overrides of {', '.join(map(str, overrides))}" if overrides else str(path)
        raise type(reason)(f"{source}: {reason}") from None


def _require_shallow(name: str, content: Mapping[str, Any]) -> None:
    try:
        require_shallow(content)
    except ValueError as reason:
        raise ConfigError(f"{name}: {reason}") from None


def _config_of(content: Mapping[str, Any], generation: Mapping[str, Any], overrides: Mapping[str, Any]) -> ModelConfig:
    text = content if content.get("text_config") is None else ConfigKeys(content).mapping("text_config")
    envelope = {key: content[key] for key in _ENVELOPE_KEYS if key in content}
    keys = ConfigKeys({**envelope, **text, **overrides})
    if "text_config" in keys:
        raise ConfigError("text_config: expected at the top level only; overrides reach into it by themselves")
    model = recognise(keys, content)
    for key, unused_values in _FOREIGN_KEYS.items():
        if key in keys and keys[key] not in unused_values:
            raise UnsupportedConfigError(
                f"{key}: this kind of sparse attention is not supported, got {shown(keys[key])}"
            )
    keys.require_fixed(_FIXED_KEYS)
    common: dict[str, Any] = {"architecture": model.architecture, "model_type": model.model_type}
    common["eos_token_ids"] = _eos_token_ids(keys, {} if "eos_token_id" in overrides else generation)
    reader = {"mla": _mla_config, "dsa": _dsa_config, "compressed": _compressed_config}[model.family]
    config = reader(keys, common)
    keys.asked.update(_UNREAD_KEYS if model.family == "mla" else ())
    _require_known(overrides, keys.asked)
    for warning in config.warnings:
        logger.warning("config: %s", warning)
    if config.index_schedule.letters:
        logger.info("index schedule: %s", config.index_schedule.describe())
    logger.info("softmax scale: %s", config.scale.describe())
    return config


def _common_fields(
    keys: ConfigKeys, schedule: IndexSchedule, warnings: tuple[str, ...], scale: SoftmaxScale
) -> dict[str, Any]:
    """The fields of ModelConfig that are read in one way, whatever the attention; not those of the indexer."""
    return {
        "vocab_size": keys.integer("vocab_size", MAX_VOCAB_SIZE),
        "hidden_size": keys.integer("hidden_size"),
        "num_hidden_layers": keys.integer("num_hidden_layers", MAX_LAYERS),
        "num_attention_heads": keys.integer("num_attention_heads"),
        "qk_rope_head_dim": keys.integer("qk_rope_head_dim"),
        "rms_norm_eps": keys.number("rms_norm_eps"),
        "tie_word_embeddings": keys.boolean("tie_word_embeddings", default=False),
        "max_position_embeddings": keys.integer("max_position_embeddings", MAX_POSITIONS),
        "scale": scale,
        "index_schedule": schedule,
        "num_nextn_predict_layers": keys.integer("num_nextn_predict_layers", MAX_LAYERS, minimum=0, default=0),
        "dtype": _dtype(keys),
        "bos_token_id": _bos_token_id(keys),
        "warnings": (*schedule.warnings, *scale.warnings, *warnings),
    }


def _latent_fields(keys: ConfigKeys) -> dict[str, Any]:
    fields = {key: keys.integer(key) for key in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
    qk_head_dim = fields["qk_nope_head_dim"] + keys.integer("qk_rope_head_dim")
    if keys.get("qk_head_dim", qk_head_dim) != qk_head_dim:
        keys.refuse("qk_head_dim", f"qk_nope_head_dim + qk_rope_head_dim = {qk_head_dim}")
    return fields


def _indexer_fields(keys: ConfigKeys) -> dict[str, Any]:
    return {key: keys.integer(key) for key in ("index_n_heads", "index_head_dim", "index_topk")}


_NO_INDEXER: Mapping[str, Any] = {"index_n_heads": 0, "index_head_dim": 0, "index_topk": 0}


def _mla_config(keys: ConfigKeys, named: Mapping[str, Any]) -> MlaConfig:
    for key in _INDEXER_KEYS:
        if key in keys:
            raise ConfigError(f"{key}: {named['architecture']} has no indexer, got {shown(keys[key])}")
    rope, warnings = read_rope(keys)
    return MlaConfig(
        **named,
        **_common_fields(keys, IndexSchedule(""), warnings, resolve_softmax_scale(keys)),
        **_latent_fields(keys),
        **_NO_INDEXER,
        q_lora_rank=keys.integer("q_lora_rank", minimum=0, default=0),
        rope=rope,
    )


def _dsa_config(keys: ConfigKeys, named: Mapping[str, Any]) -> DsaConfig:
    keys.require_fixed(_FIXED_FEED_FORWARD_KEYS)
    num_layers = keys.integer("num_hidden_layers", MAX_LAYERS)
    schedule = resolve_index_schedule(keys, num_layers)
    common = _common_fields(keys, schedule, (), resolve_softmax_scale(keys))
    rope, rope_warnings = read_rope(keys)
    common["warnings"] += rope_warnings
    n_routed_experts = keys.integer("n_routed_experts", MAX_EXPERTS, minimum=0, default=0)
    has_experts = n_routed_experts > 0
    absent: Any = REQUIRED if has_experts else 0
    least = int(has_experts)
    config = DsaConfig(
        **named,
        **common,
        **_latent_fields(keys),
        **_indexer_fields(keys),
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
        weight_block_size=_weight_block_size(keys),
    )
    if "layer_types" in keys:  # says again what the architecture says
        keys.entries("layer_types", _INDEXED_LAYER_TYPES, num_layers)
    return replace(config, warnings=(*config.warnings, *_pattern_warnings(keys, config)))


def _compressed_config(keys: ConfigKeys, named: Mapping[str, Any]) -> CompressedConfig:
    keys.require_fixed({"num_key_value_heads": 1})
    kinds = read_layer_kinds(keys, keys.integer("num_hidden_layers", MAX_LAYERS))
    selecting = tuple(layer for layer, kind in enumerate(kinds) if kind == "c4a")
    schedule = resolve_index_schedule(keys, len(kinds), layer_ids=selecting)
    common = _common_fields(keys, schedule, (), compressed_softmax_scale(keys))
    main_rope, compress_rope, rope_warnings = read_rope_pair(keys)
    common["warnings"] += rope_warnings
    config = CompressedConfig(
        **named,
        **common,
        **(_indexer_fields(keys) if selecting else _NO_INDEXER),
        q_lora_rank=keys.integer("q_lora_rank"),
        head_dim=keys.integer("head_dim"),
        o_groups=keys.integer("o_groups"),
        o_lora_rank=keys.integer("o_lora_rank"),
        sliding_window=keys.integer("sliding_window", MAX_POSITIONS),
        layer_kinds=kinds,
        main_rope=main_rope,
        compress_rope=compress_rope,
        weight_block_size=_weight_block_size(keys),
        **read_compressed_experts(keys, len(kinds)),
    )
    return replace(config, warnings=(*config.warnings, *_pattern_warnings(keys, config)))


def _pattern_warnings(keys: ConfigKeys, config: ModelConfig) -> tuple[str, ...]:
    """W3 if the pattern in use may be another model's; with `strict_pattern` that is E14."""
    is_strict = keys.boolean("strict_pattern", default=False)
    if config.index_schedule.dialect != "index_topk_pattern":
        return ()
    doubts = pattern_doubts(keys["index_topk_pattern"], config.index_schedule.letters, config)
    if doubts is None:
        return ()
    if is_strict:
        raise IndexScheduleError("E14", doubts)
    return (f"W3: {doubts}",)


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


def _weight_block_size(keys: ConfigKeys) -> tuple[int, int] | None:
    if "quantization_config" not in keys:
        return None
    quantization = keys.mapping("quantization_config")
    quantization.value("quant_method")
    quantization.require_fixed({"quant_method": "fp8", **_FIXED_QUANTIZATION_KEYS})
    size = quantization.value("weight_block_size")
    is_pair = isinstance(size, list | tuple) and len(size) == 2
    if not is_pair or not all(type(side) is int and 1 <= side <= MAX_WIDTH for side in size):
        quantization.refuse("weight_block_size", f"two ints from 1 to {MAX_WIDTH}")
    for key in quantization:
        if key not in quantization.asked and key not in _QUANTIZATION_KEYS_WITHOUT_EFFECT:
            raise UnsupportedConfigError(f"quantization_config.{key}: not supported, got {shown(quantization[key])}")
    return size[0], size[1]


def _dtype(keys: ConfigKeys) -> str:
    values = {key: keys[key] for key in ("dtype", "torch_dtype") if key in keys}
    for key, value in values.items():
        if value not in _DTYPES:
            keys.refuse(key, " or ".join(_DTYPES))
    if len(set(values.values())) > 1:
        raise ConfigError(f"dtype: {values['dtype']}, but torch_dtype: {values['torch_dtype']}")
    return next(iter(values.values()), "bfloat16")


def _bos_token_id(keys: ConfigKeys) -> int | None:
    return keys.integer("bos_token_id", MAX_VOCAB_SIZE, minimum=0) if "bos_token_id" in keys else None


def _eos_token_ids(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of every source, each once, in order; a source holds none, one or a list."""
    token_ids: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        if value is None:
            continue
        for token_id in value if isinstance(value, list | tuple) else [value]:
            if type(token_id) is not int or token_id < 0:
                raise ConfigError(f"eos_token_id: expected an int >= 0 or a list of them, got {shown(value)}")
            token_ids.append(token_id)
    return tuple(dict.fromkeys(token_ids))


def _require_known(overrides: Iterable[str], known: set[str]) -> None:
    for key in overrides:
        if key not in known:
            raise ConfigError(f"overrides: unknown key {shown(key)}, the nearest known one is {nearest(key, known)!r}")
