"""Which model a config.json is of: by its names, and by what it holds where names are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastdeploy_dsa.config.keys import ConfigError, ConfigKeys, UnsupportedConfigError
from fastdeploy_dsa.softmax_scale import has_compressed_attention
from fastdeploy_dsa.wording import shown

AttentionFamily = Literal["mla", "dsa", "compressed"]


@dataclass(frozen=True)
class ModelName:
    """A model as config.json names it, and the attention it has."""

    architecture: str
    model_type: str
    family: AttentionFamily


MODELS = (
    ModelName("DeepseekV2ForCausalLM", "deepseek_v2", "mla"),
    ModelName("DeepseekV3ForCausalLM", "deepseek_v3", "mla"),
    ModelName("DeepseekV32ForCausalLM", "deepseek_v32", "dsa"),
    ModelName("GlmMoeDsaForCausalLM", "glm_moe_dsa", "dsa"),
    ModelName("DeepseekV4ForCausalLM", "deepseek_v4", "compressed"),
)

# Keys that only DeepSeek-V4.1 has: layers that read the entries or the selection of another layer by its id.
_SOURCE_LAYER_KEYS = ("kv_source_layer_ids", "index_source_layer_ids", "candidate_source_layer_id")
_UNSUPPORTED_RATIOS = (1, 2)


def recognise(keys: ConfigKeys, content: Mapping[str, Any]) -> ModelName:
    """The model, from `architectures` or `model_type` of the text config, else of the whole file.

    Args:
        keys: The text config, overrides applied.
        content: The whole file.

    Raises:
        UnsupportedConfigError: A model that is not read.
        ConfigError: Names that contradict each other or what the config holds.
    """
    source = keys if "architectures" in keys or "model_type" in keys else ConfigKeys(content)
    names, model_type = source.get("architectures"), source.get("model_type")
    if names is not None and not (isinstance(names, list | tuple) and len(names) == 1 and isinstance(names[0], str)):
        source.refuse("architectures", "a list of one name")
    if model_type is not None and not isinstance(model_type, str):
        source.refuse("model_type", "a string")
    name = None if names is None else names[0]
    _refuse_source_layers(keys, f"{name} {model_type}")
    model = _model_of_names(name, model_type, is_compressed=has_compressed_attention(keys))
    if has_compressed_attention(keys) and model.family != "compressed":
        marker = next(
            key for key in ("compress_ratios", "compress_rates", "layer_types", "rope_parameters") if key in keys
        )
        raise ConfigError(f"{marker}: no part of {model.architecture}, got {shown(keys[marker])}")
    return model


def _refuse_source_layers(keys: ConfigKeys, names: str) -> None:
    """DeepSeek-V4.1 (later work) is told by its name, its source-layer lists or its ratios of 1 and 2."""
    reasons = [key for key in _SOURCE_LAYER_KEYS if key in keys]
    ratios = keys.get("compress_ratios")
    if isinstance(ratios, list | tuple):
        found = {ratio for ratio in ratios if type(ratio) is int}
        reasons += [f"compression ratio {ratio}" for ratio in _UNSUPPORTED_RATIOS if ratio in found]
    is_named = "deepseekv41" in names.lower().replace("_", "").replace(".", "")
    has_v4_name = "deepseekv4" in names.lower().replace("_", "")
    if is_named or (reasons and (has_v4_name or has_compressed_attention(keys))):
        raise UnsupportedConfigError(
            "DeepSeek-V4.1 is not supported yet: its layers read the entries and selections of source layers"
            + (f" ({', '.join(reasons)})" if reasons else "")
        )


def _model_of_names(name: str | None, model_type: str | None, *, is_compressed: bool) -> ModelName:
    if name is not None:
        for model in MODELS:
            if model.architecture == name:
                if model_type not in (None, model.model_type):
                    raise ConfigError(
                        f"model_type: expected {model.model_type!r} beside architecture {name},"
                        f" got {shown(model_type)}"
                    )
                return model
        known = " or ".join(model.architecture for model in MODELS)
        raise UnsupportedConfigError(f"architectures: expected {known}, got {shown(name)}")
    for model in MODELS:
        if model.model_type == model_type or (model_type is None and is_compressed and model.family == "compressed"):
            return model
    known = " or ".join(model.model_type for model in MODELS)
    raise UnsupportedConfigError(f"model_type: expected {known}, got {shown(model_type)}")
