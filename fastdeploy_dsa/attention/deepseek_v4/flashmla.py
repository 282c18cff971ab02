"""The attention class of NVIDIA GPUs with fp8 rows, as FlashMLA lays them out: 584 bytes for 448 + 64 numbers."""

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

_HEAD_DIM, _ROPE_DIM = 512, 64
_HEADS = (64, 128)  # head counts of the kernels


class DeepseekV4FlashMLAAttention(DeepseekV4Attention):
    """Queries go to the kernel as bfloat16, filled up to 64 or 128 heads (rule S45)."""

    cache_formats: ClassVar[tuple[CacheFormat, ...]] = ("fp8",)

    @classmethod
    def supports(cls, config: CompressedConfig, device: str, cache_format: CacheFormat) -> Support:
        if device == CPU:
            return Support(False, "a GPU's layout, got device 'cpu'")
        if cache_format not in cls.cache_formats:
            return Support(False, f"its rows are fp8, got cache_dtype {cache_format!r}")
        if (config.head_dim, config.qk_rope_head_dim) != (_HEAD_DIM, _ROPE_DIM):
            return Support(
                False,
                f"a row is {_HEAD_DIM} numbers, {_ROPE_DIM} of them rotated,"
                f" got head_dim {config.head_dim} and qk_rope_head_dim {config.qk_rope_head_dim}",
            )
        if config.num_attention_heads > _HEADS[-1]:
            return Support(False, f"at most {_HEADS[-1]} heads, got {config.num_attention_heads}")
        return kernel_support(device)

    @classmethod
    def get_padded_num_q_heads(cls, num_heads: int) -> int:
        for padded in _HEADS:
            if num_heads <= padded:
                return padded
        raise ValueError(f"num_heads: expected at most {_HEADS[-1]}, got {num_heads}")

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
        rounded = q.astype("bfloat16")
        out = attn_backend.forward(
            rounded, (kv,), layer_id=self._layer_id, step=step, caches=caches, selection=selection, sinks=self._sinks
        )
        return out.astype("float32")
