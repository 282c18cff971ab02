"""Models of the DSA family and how they are loaded."""

from fastdeploy_dsa.models.deepseek_v32 import DeepseekV32ForCausalLM
from fastdeploy_dsa.models.loader import load_model, load_model_with_mtp
from fastdeploy_dsa.models.mtp import MtpModel

__all__ = ["DeepseekV32ForCausalLM", "MtpModel", "load_model", "load_model_with_mtp"]
