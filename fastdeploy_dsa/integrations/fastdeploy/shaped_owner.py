"""Backends of FastDeploy's own as owners of a cache: from the shapes they tell, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
from paddle import Tensor

from cache_manager import CacheTensorSpec, TensorKey, ordered_keys
from fastdeploy_dsa.cache_layout import ITEM_BYTES

STORAGE_NAMES = {
    "key": "key_caches",
    "value": "value_caches",
    "key_scale": "key_cache_scales",
    "value_scale": "value_cache_scales",
    "indexer": "indexer_caches",
}
"""Role to the first part of a tensor's name outside the process, as every version of FastDeploy spells it."""

SCALED = "block_wise_fp8"
"""The quantisation with a scale per token and head."""


class ShapedOwner:
    """A CacheOwner over a backend that answers get_kv_cache_shape with two shapes or with three."""

    def __init__(self, attn_backend: Any) -> None:
        """Keep the backend."""
        self._backend = attn_backend

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        """Roles in FastDeploy's order: key, value, their scales, indexer; those without a shape are left out."""
        shapes = self._backend.get_kv_cache_shape(max_num_blocks=1, kv_cache_quant_type=kv_cache_quant_type)
        key, value, indexer = (*shapes, None)[:3]
        dtype, scale_dtype = cache_dtype or paddle.get_default_dtype(), paddle.get_default_dtype()
        roles: list[tuple[str, Sequence[int] | None, str]] = [("key", key, dtype), ("value", value, dtype)]
        if kv_cache_quant_type == SCALED:
            roles += [("key_scale", key[:3], scale_dtype), ("value_scale", value and value[:3], scale_dtype)]
        roles.append(("indexer", indexer, dtype))
        return tuple(
            CacheTensorSpec(
                role=role,
                storage_name=STORAGE_NAMES[role],
                layer_ids=layer_ids,
                block_shape=tuple(shape[1:]),
                dtype=of_role,
                item_bytes=ITEM_BYTES[of_role],
                layout_id=f"{role}/{of_role}",
            )
            for role, shape, of_role in roles
            if shape
        )

    def create_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        cache_dtype: str | None = None,
        kv_cache_quant_type: str | None = None,
        layer_offset: int = 0,
    ) -> dict[TensorKey, Tensor]:
        """Zero-filled tensors of what cache_spec says."""
        layer_ids = tuple(range(layer_offset, layer_offset + num_layers))
        specs = self.cache_spec(layer_ids, cache_dtype, kv_cache_quant_type)
        by_role = {spec.role: spec for spec in specs}
        return {
            key: paddle.zeros([num_blocks, *by_role[key[0]].block_shape], dtype=getattr(paddle, by_role[key[0]].dtype))
            for key in ordered_keys(specs)
        }
