"""Models of the DSA family and how they are loaded."""

from fastdeploy_dsa.models.deepseek_v32 import DeepseekV32ForCausalLM
from fastdeploy_dsa.models.loader import load_model

__all__ = ["DeepseekV32ForCausalLM", "load_model"]
