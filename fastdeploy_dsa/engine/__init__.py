"""Continuous-batching inference: prompts in, tokens and text out."""

from fastdeploy_dsa.engine.cache_stats import EngineCacheStats
from fastdeploy_dsa.engine.core import TimeSplit
from fastdeploy_dsa.engine.engine import LLM
from fastdeploy_dsa.engine.outputs import RequestDelta, RequestOutput, TokenLogprob
from fastdeploy_dsa.engine.sampling_params import SamplingParams
from fastdeploy_dsa.engine.speculative.stats import SpeculativeStats

__all__ = [
    "LLM",
    "EngineCacheStats",
    "RequestDelta",
    "RequestOutput",
    "SamplingParams",
    "SpeculativeStats",
    "TimeSplit",
    "TokenLogprob",
]
