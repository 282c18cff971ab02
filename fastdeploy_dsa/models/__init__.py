"""The models that the engine runs and how they are loaded."""

from fastdeploy_dsa.models.deepseek_v4 import DeepseekV4ForCausalLM
from fastdeploy_dsa.models.deepseek_v4_mtp import DeepseekV4MtpModel
from fastdeploy_dsa.models.deepseek_v32 import DeepseekV32ForCausalLM
from fastdeploy_dsa.models.loader import (
    DraftModel,
    RunnableConfig,
    TargetModel,
    load_model,
    load_model_with_mtp,
    read_runnable_config,
)
from fastdeploy_dsa.models.mtp import MtpModel

__all__ = [
    "DeepseekV4ForCausalLM",
    "DeepseekV4MtpModel",
    "DeepseekV32ForCausalLM",
    "DraftModel",
    "MtpModel",
    "RunnableConfig",
    "TargetModel",
    "load_model",
    "load_model_with_mtp",
    "read_runnable_config",
]
