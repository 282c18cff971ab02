"""Fields that several kinds of models read in one way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdeploy_dsa.config.keys import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB_SIZE,
    MAX_WIDTH,
    ConfigError,
    ConfigKeys,
    UnsupportedConfigError,
)
from fastdeploy_dsa.config.model_config import ModelConfig
from fastdeploy_dsa.index_pattern import pattern_doubts
from fastdeploy_dsa.index_schedule import IndexSchedule, IndexScheduleError
from fastdeploy_dsa.softmax_scale import SoftmaxScale
from fastdeploy_dsa.wording import shown

_DTYPES = ("bfloat16", "float16", "float32")
_FIXED_QUANTIZATION_KEYS: Mapping[str, object] = {"fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
# A tensor's dtype says how it is stored, and what is stored as fp8 is always dequantized.
_QUANTIZATION_KEYS_WITHOUT_EFFECT = ("modules_to_not_convert", "dequantize", "expert_dtype")

NO_INDEXER: Mapping[str, Any] = {"index_n_heads": 0, "index_head_dim": 0, "index_topk": 0}


def common_fields(
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


def latent_fields(keys: ConfigKeys) -> dict[str, Any]:
    """Widths of latent attention."""
    fields = {key: keys.integer(key) for key in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
    qk_head_dim = fields["qk_nope_head_dim"] + keys.integer("qk_rope_head_dim")
    if keys.get("qk_head_dim", qk_head_dim) != qk_head_dim:
        keys.refuse("qk_head_dim", f"qk_nope_head_dim + qk_rope_head_dim = {qk_head_dim}")
    return fields


def indexer_fields(keys: ConfigKeys) -> dict[str, Any]:
    """Heads, width and selection of the indexer."""
    return {key: keys.integer(key) for key in ("index_n_heads", "index_head_dim", "index_topk")}


def pattern_warnings(keys: ConfigKeys, config: ModelConfig) -> tuple[str, ...]:
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


def read_weight_block_size(keys: ConfigKeys) -> tuple[int, int] | None:
    """Rows and columns of fp8 weights that share a scale; None without quantisation."""
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
