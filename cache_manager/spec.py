"""What the cache manager needs to know of a cache tensor: names, shapes and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

TensorKey = tuple[str, int]
"""(role, absolute layer id) of a cache tensor."""


@dataclass(frozen=True)
class CacheTensorSpec:
    """One role of a paged cache: the same tensor for every layer that has it.

    A layer's tensor has shape `(num_blocks, *block_shape)`.

    Attributes:
        role: Look-up name of the tensor inside a layer.
        storage_name: First part of the tensor's name outside the process.
        layer_ids: Absolute ids of the layers that have this tensor, ascending.
        block_shape: Shape of one block.
        dtype: Name of the element type.
        item_bytes: Bytes of one element.
        layout_id: What the bytes mean; two caches may exchange blocks only if theirs are equal.
    """

    role: str
    storage_name: str
    layer_ids: tuple[int, ...]
    block_shape: tuple[int, ...]
    dtype: str
    item_bytes: int
    layout_id: str

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in one layer."""
        return math.prod(self.block_shape) * self.item_bytes

    @property
    def bytes_per_block_all_layers(self) -> int:
        """Bytes of one block over all layers that have this tensor."""
        return self.bytes_per_block * len(self.layer_ids)


def ordered_keys(specs: tuple[CacheTensorSpec, ...]) -> tuple[TensorKey, ...]:
    """(role, layer) of every tensor of the specs: by layer, inside a layer in the order of the specs."""
    layers = sorted({layer for spec in specs for layer in spec.layer_ids})
    return tuple((spec.role, layer) for layer in layers for spec in specs if layer in spec.layer_ids)
