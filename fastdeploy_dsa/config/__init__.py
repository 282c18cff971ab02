"""A Hugging Face config.json as one frozen, validated object; nothing else reads raw keys."""

from fastdeploy_dsa.config.compressed import CompressedConfig
from fastdeploy_dsa.config.compressed_experts import RouterType
from fastdeploy_dsa.config.compressed_layers import RATIO_OF_KIND
from fastdeploy_dsa.config.dsa import DsaConfig, MlpType
from fastdeploy_dsa.config.families import MODELS, ModelName
from fastdeploy_dsa.config.keys import ConfigError, UnsupportedConfigError
from fastdeploy_dsa.config.mla import MlaConfig
from fastdeploy_dsa.config.model_config import LayerKind, ModelConfig
from fastdeploy_dsa.config.rope import RopeConfig

MODEL_TYPE_OF_ARCHITECTURE = {model.architecture: model.model_type for model in MODELS if model.family != "mla"}
"""The models the engine can run."""

__all__ = [
    "MODELS",
    "MODEL_TYPE_OF_ARCHITECTURE",
    "RATIO_OF_KIND",
    "CompressedConfig",
    "ConfigError",
    "DsaConfig",
    "LayerKind",
    "MlaConfig",
    "MlpType",
    "ModelConfig",
    "ModelName",
    "RopeConfig",
    "RouterType",
    "UnsupportedConfigError",
]
