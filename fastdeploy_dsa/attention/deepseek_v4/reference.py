"""The attention class of the CPU: every cache format, float32 throughout; what the other classes are compared with."""

from __future__ import annotations

from typing import ClassVar

from paddle import Tensor

from fastdeploy_dsa.attention.backend import KVCaches, Support, kernel_support
from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.attention.deepseek_v4.base import DeepseekV4Attention
from fastdeploy_dsa.attention.deepseek_v4.step import CompressedStep
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.ops import CacheFormat, IndexSelection


class DeepseekV4ReferenceAttention(DeepseekV4Attention):
    """No padding, no rounding of queries; runs on any device that the ops have kernels for."""

    cache_formats: ClassVar[tuple[CacheFormat, ...]] = ("float32", "bfloat16", "fp8")

    @classmethod
    def supports(cls, config: CompressedConfig, device: str, cache_format: CacheFormat) -> Support:
        return kernel_support(device)

    @classmethod
    def get_padded_num_q_heads(cls, num_heads: int) -> int:
        return num_heads

    def forward_mqa(
        self,
        q: Tensor,
        kv: Tensor,
        *,
        step: CompressedStep,
        attn_backend: DeepseekV4AttentionBackend,
        caches: KVCaches,
        selection: IndexSelection | None,
    ) -> Tensor:
        return attn_backend.forward(
            q, (kv,), layer_id=self._layer_id, step=step, caches=caches, selection=selection, sinks=self._sinks
        )
