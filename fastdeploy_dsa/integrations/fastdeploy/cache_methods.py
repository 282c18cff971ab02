"""The cache methods of FastDeploy's attention backends, from what a backend declares.

FastDeploy's runner and controllers call them by keyword; versions before backend-owned caches call get_kv_cache_shape
alone. The same class serves both.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from typing import Any

from paddle import Tensor

from cache_manager import CacheTensorSpec, TensorKey, ordered_keys
from fastdeploy_dsa.attention.backend import AttentionBackend


class CacheMethods(ABC):
    """A mixin that answers FastDeploy's cache questions from an AttentionBackend of this package."""

    @property
    @abstractmethod
    def owner(self) -> AttentionBackend:
        """The backend that declares the cache."""

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        """As AttentionBackend.cache_spec."""
        return self.owner.cache_spec(layer_ids, cache_dtype=cache_dtype, kv_cache_quant_type=kv_cache_quant_type)

    def create_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        cache_dtype: str | None = None,
        kv_cache_quant_type: str | None = None,
        layer_offset: int = 0,
    ) -> dict[TensorKey, Tensor]:
        """As AttentionBackend.create_kv_cache."""
        return self.owner.create_kv_cache(
            num_layers=num_layers,
            num_blocks=num_blocks,
            cache_dtype=cache_dtype,
            kv_cache_quant_type=kv_cache_quant_type,
            layer_offset=layer_offset,
        )

    def create_host_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        cache_item_bytes: int,
        kv_cache_quant_type: str | None = None,
        layer_offset: int = 0,
    ) -> dict[TensorKey, int]:
        """Page-locked memory for the blocks of every tensor.

        Args:
            num_layers: Layers from layer_offset on.
            num_blocks: Blocks of a layer.
            cache_item_bytes: FastDeploy passes it; the bytes of a block are declared.
            kv_cache_quant_type: As cache_spec.
            layer_offset: First layer.

        Returns:
            (role, absolute layer id) to address.

        Raises:
            NotImplementedError: FastDeploy has no allocator of page-locked memory here; nothing is allocated. It is
                the one exception that FastDeploy's own controller takes for "there is no host tier".
        """
        allocate, free = _host_memory()
        if allocate is None or free is None:
            raise NotImplementedError("FastDeploy has no cuda_host_alloc and cuda_host_free here: no host cache")
        layer_ids = tuple(range(layer_offset, layer_offset + num_layers))
        specs = self.cache_spec(layer_ids, kv_cache_quant_type=kv_cache_quant_type)
        block_bytes = {spec.role: spec.bytes_per_block for spec in specs}
        addresses: dict[TensorKey, int] = {}
        try:
            for role, layer in ordered_keys(specs):
                addresses[role, layer] = int(allocate(num_blocks * block_bytes[role]))
        except Exception:
            self.free_host_kv_cache(addresses)
            raise
        return addresses

    def free_host_kv_cache(self, host_caches: MutableMapping[Any, int]) -> None:
        """Release what create_host_kv_cache returned, whatever its keys are by now; the mapping is empty afterwards.

        One address that cannot be released is logged and does not keep the others.
        """
        _, free = _host_memory()
        addresses = [address for address in host_caches.values() if address]
        host_caches.clear()
        if addresses and free is None:
            logging.getLogger(__name__).error("FastDeploy has no cuda_host_free here: host memory was not released")
            return
        for address in addresses:
            try:
                free(address)
            except Exception:
                logging.getLogger(__name__).exception("host memory at %#x was not released", address)

    def get_kv_cache_shape(self, max_num_blocks: int, kv_cache_quant_type: str | None = None) -> tuple[list[int], ...]:
        """Shapes of the tensors of a layer that has all of them: key, an empty value, and what else there is."""
        shapes = {
            spec.role: [max_num_blocks, *spec.block_shape]
            # The first layer shares nothing.
            for spec in self.cache_spec((0,), kv_cache_quant_type=kv_cache_quant_type)
        }
        key = shapes.pop("key")
        return (key, [], *shapes.values())

    def bytes_per_block(self, num_layers: int, layer_offset: int = 0) -> int:
        """As AttentionBackend.bytes_per_block."""
        return self.owner.bytes_per_block(num_layers, layer_offset)


def _host_memory() -> tuple[Any, Any]:
    """FastDeploy's allocator of page-locked memory and its counterpart; None where its ops are not built."""
    from fastdeploy.cache_manager import ops

    return getattr(ops, "cuda_host_alloc", None), getattr(ops, "cuda_host_free", None)
