"""FastDeploy's MLA_ATTN backend with a declared cache: its own kernels compute, layout and bytes come from here."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from fastdeploy.model_executor.layers.attention import mla_attention_backend

from cache_manager import CacheTensorSpec
from fastdeploy_dsa.attention.mla import MLAAttentionBackend
from fastdeploy_dsa.cache_layout import ITEM_BYTES
from fastdeploy_dsa.integrations.fastdeploy.cache_methods import CacheMethods
from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError


class FastDeployMLABackend(CacheMethods, mla_attention_backend.MLAAttentionBackend):  # type: ignore[misc]
    """Dense latent attention is FastDeploy's own: it has kernels for it and calls them from its model code."""

    attn_softmax_scale: float = 1.0

    def __init__(
        self,
        fd_config: Any,
        kv_num_heads: int,
        num_heads: int,
        head_dim: int,
        encoder_block_shape_q: int = -1,
        decoder_block_shape_q: int = -1,
    ) -> None:
        """As every backend of FastDeploy.

        Raises:
            PluginError: The cache should be quantised: the kernels read latent rows as they are.
        """
        refuse_quantised_cache(getattr(fd_config.quant_config, "kv_cache_quant_type", None))
        super().__init__(fd_config, kv_num_heads, num_heads, head_dim, encoder_block_shape_q, decoder_block_shape_q)

    @cached_property
    def owner(self) -> MLAAttentionBackend:
        """This package's backend of the same sizes; what it declares takes the dtype it is asked for."""
        return _DtypeOfCaller(
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            softmax_scale=self.attn_softmax_scale,
            cache_format="bfloat16",
            block_size=self.block_size,
        )


class _DtypeOfCaller(MLAAttentionBackend):
    """Latent rows in the model's dtype, which FastDeploy passes with every call."""

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        """Role `key` on every layer, as MLAAttentionBackend.

        Raises:
            PluginError: A quantised cache.
        """
        refuse_quantised_cache(kv_cache_quant_type)
        (spec,) = super().cache_spec(layer_ids)
        if cache_dtype in (None, spec.dtype):
            return (spec,)
        layout_id = spec.layout_id.replace(spec.dtype, str(cache_dtype))
        return (replace(spec, dtype=str(cache_dtype), item_bytes=ITEM_BYTES[str(cache_dtype)], layout_id=layout_id),)


def refuse_quantised_cache(kv_cache_quant_type: str | None) -> None:
    """FastDeploy's dense kernels read latent rows as they are.

    Raises:
        PluginError: Names both settings.
    """
    if kv_cache_quant_type is not None:
        raise PluginError(
            f"FD_ATTENTION_BACKEND=MLA_ATTN and kv_cache_quant_type {kv_cache_quant_type} contradict each other: the "
            "latent cache is not quantised"
        )
