"""The cache tensors of one model, and who declares them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cache_manager.spec import CacheTensorSpec, TensorKey

Tensor = Any  # the framework's tensor: the cache manager moves references and never looks inside


class CacheOwner(Protocol):
    """What the controller asks of an attention backend."""

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        """The cache tensors of these layers, in the order they have inside a layer."""

    def create_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        cache_dtype: str | None = None,
        kv_cache_quant_type: str | None = None,
        layer_offset: int = 0,
    ) -> Mapping[TensorKey, Tensor]:
        """Zero-filled tensors for layers layer_offset .. layer_offset + num_layers - 1."""


@dataclass(frozen=True)
class CacheGroup:
    """The cache of one model: its tensors by (role, layer), in flat-list order."""

    specs: tuple[CacheTensorSpec, ...]
    num_blocks: int
    tensors: Mapping[TensorKey, Tensor]

    @property
    def positions(self) -> dict[TensorKey, int]:
        """Place of every (role, layer) in the flat list that initialize_* returned."""
        return {key: place for place, key in enumerate(self.tensors)}
