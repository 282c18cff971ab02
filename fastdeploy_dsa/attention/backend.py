"""AttentionBackend: the contract of an attention variant, which owns its cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import paddle
from paddle import Tensor

from cache_manager import MAIN_POOL, CachePool, CacheTensorSpec, ordered_keys
from fastdeploy_dsa.config import ModelConfig
from fastdeploy_dsa.device import refusal
from fastdeploy_dsa.ops import IndexSelection
from fastdeploy_dsa.step import StepMetadata

KVCaches = Mapping[tuple[str, int], Tensor]


class Support(NamedTuple):
    """Whether a choice is possible, and why not: the same conditions choose and explain."""

    ok: bool
    reason: str = ""


def kernel_support(device: str) -> Support:
    """Whether the ops have kernels for a device."""
    reason = refusal(device)
    return Support(not reason, reason)


class AttentionBackend(ABC):
    """Attention over a paged cache whose layout the backend declares.

    Names and signatures of the cache methods follow FastDeploy's, so that its worker can call them.
    """

    pin_kv_cache_for_cudagraph: ClassVar[bool] = True
    """Captured graphs bake the cache's addresses in: whoever holds the tensors must not move them meanwhile."""

    def __init__(self, *, block_size: int) -> None:
        """Keep the block size, in tokens."""
        if block_size < 1:
            raise ValueError(f"block_size: expected 1 or more, got {block_size}")
        self.block_size = block_size

    @classmethod
    @abstractmethod
    def supports(cls, config: ModelConfig, device: str) -> Support:
        """Whether this backend serves the model on the device ("cpu", "gpu:0", ...)."""

    @abstractmethod
    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        """The cache tensors of these layers, in the order they have inside a layer.

        Args:
            layer_ids: Absolute ids, draft layers included.
            cache_dtype: Element type; None: the backend's own choice.
            kv_cache_quant_type: Quantisation of the cache, as FastDeploy names it.
        """

    def cache_pools(self) -> tuple[CachePool, ...]:
        """The pools that specs name besides the main one, whose blocks have block_size tokens and keep all of them."""
        return ()

    @abstractmethod
    def forward(
        self,
        query: Tensor,
        entries: tuple[Tensor, ...],
        *,
        layer_id: int,
        step: StepMetadata,
        caches: KVCaches,
        selection: IndexSelection | None = None,
    ) -> Tensor:
        """Write this step's cache entries, then attend; all writes come before any read.

        Args:
            query: [num_rows, num_heads, width of a head].
            entries: What the step's tokens add to the layer's cache, in the variant's own parts.
            layer_id: Absolute id.
            step: The rows.
            caches: Cache tensors by (role, layer id).
            selection: The tokens to attend to, for variants that attend to a selection.

        Returns:
            [num_rows, num_heads, width of a value head]; 0 for padding rows.
        """

    def create_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        cache_dtype: str | None = None,
        kv_cache_quant_type: str | None = None,
        layer_offset: int = 0,
        window_blocks: Mapping[str, int] | None = None,
    ) -> dict[tuple[str, int], Tensor]:
        """Allocate the cache of layers layer_offset .. layer_offset + num_layers - 1, filled with zeros.

        Args:
            num_layers: Of these layers.
            num_blocks: Of the main pool.
            cache_dtype: As cache_spec.
            kv_cache_quant_type: As cache_spec.
            layer_offset: The first layer.
            window_blocks: Blocks of each of cache_pools by name; None: there are no such pools.

        Returns:
            (role, absolute layer id) to tensor, ordered by layer and inside a layer as cache_spec declares.
        """
        layer_ids = tuple(range(layer_offset, layer_offset + num_layers))
        specs = self.cache_spec(layer_ids, cache_dtype=cache_dtype, kv_cache_quant_type=kv_cache_quant_type)
        by_key = {(spec.role, layer): spec for spec in specs for layer in spec.layer_ids}
        counts = {MAIN_POOL: num_blocks, **(window_blocks or {})}

        def zeros(spec: CacheTensorSpec) -> Tensor:
            return paddle.zeros([counts[spec.pool], *spec.block_shape], dtype=getattr(paddle, spec.dtype))

        return {key: zeros(by_key[key]) for key in ordered_keys(specs)}

    def bytes_per_block(self, num_layers: int, layer_offset: int = 0) -> int:
        """Bytes that one block of block_size tokens takes over these layers, all roles of the main pool."""
        specs = self.cache_spec(tuple(range(layer_offset, layer_offset + num_layers)))
        return sum(spec.bytes_per_block_all_layers for spec in specs if spec.pool == MAIN_POOL)
