"""The attention class of NVIDIA GPUs with rows of plain numbers, or with fp8 rows of other sizes than FlashMLA's."""

from __future__ import annotations

from typing import ClassVar

from paddle import Tensor

from fastdeploy_dsa.attention.backend import KVCaches, Support, kernel_support
from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.attention.deepseek_v4.base import DeepseekV4Attention
from fastdeploy_dsa.attention.deepseek_v4.step import CompressedStep
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.device import CPU
from fastdeploy_dsa.ops import CacheFormat, IndexSelection


class DeepseekV4PlainRowAttention(DeepseekV4Attention):
    """As many heads as there are; queries in the precision of the cache, bfloat16 for fp8."""

    cache_formats: ClassVar[tuple[CacheFormat, ...]] = ("bfloat16", "float32", "fp8")

    @classmethod
    def supports(cls, config: CompressedConfig, device: str, cache_format: CacheFormat) -> Support:
        if device == CPU:
            return Support(False, "a GPU's kernels, got device 'cpu'")
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
        rounded = q if attn_backend.cache_format == "float32" else q.astype("bfloat16")
        out = attn_backend.forward(
            rounded, (kv,), layer_id=self._layer_id, step=step, caches=caches, selection=selection, sinks=self._sinks
        )
        return out.astype("float32")
