"""What the cache manager needs to know of a cache tensor: names, shapes and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

TensorKey = tuple[str, int]
"""(role, absolute layer id) of a cache tensor."""

MAIN_POOL = "main"
"""The pool whose blocks hold all tokens of a request; there is always this one."""


@dataclass(frozen=True)
class CachePool:
    """Blocks of a granularity of their own, in which a request keeps its last tokens only.

    A request's blocks form a ring: the block of position p is entry (p // block_tokens) % width of its table.

    Attributes:
        name: What specs call it.
        block_tokens: Tokens of a block.
        live_tokens: The next token to be computed needs the rows of so many positions, its own included: with n tokens
            confirmed, positions n - (live_tokens - 1) and up are kept.
        boundary_tokens: Rows that must exist before a boundary of main blocks so that a request can start there.
    """

    name: str
    block_tokens: int
    live_tokens: int
    boundary_tokens: int

    def __post_init__(self) -> None:
        """Check what the types do not say.

        Raises:
            ValueError: The name is taken, or a number out of range.
        """
        if self.name == MAIN_POOL:
            raise ValueError(f"name: expected another one than that of the pool of all tokens, got {self.name!r}")
        if self.block_tokens < 1 or self.live_tokens < 1:
            raise ValueError(
                f"pool {self.name}: expected block_tokens and live_tokens of 1 or more, "
                f"got {self.block_tokens} and {self.live_tokens}"
            )
        if not 0 <= self.boundary_tokens < self.live_tokens:
            raise ValueError(
                f"pool {self.name}: expected boundary_tokens from 0 to {self.live_tokens - 1}, "
                f"got {self.boundary_tokens}"
            )

    def first_live(self, num_confirmed: int) -> int:
        """First position that is kept of so many confirmed tokens."""
        return max(0, num_confirmed - (self.live_tokens - 1))

    def ring_width(self, num_step_tokens: int) -> int:
        """Most blocks that a request holds at a time.

        Args:
            num_step_tokens: Positions behind the confirmed ones that a step may write, 1 or more.
        """
        return (self.live_tokens - 1 + num_step_tokens + self.block_tokens - 2) // self.block_tokens + 1

    def blocks_of_requests(self, num_requests: int, num_step_tokens: int) -> int:
        """Most blocks that so many requests hold together.

        Args:
            num_requests: 0 or more.
            num_step_tokens: Positions behind the confirmed ones that a step may write, over all requests.
        """
        offsets = num_requests * (self.live_tokens - 1 + self.block_tokens - 2) + num_step_tokens
        return num_requests + offsets // self.block_tokens

    @property
    def boundary_blocks(self) -> int:
        """Most blocks that hold the rows before a boundary of main blocks."""
        return -(-self.boundary_tokens // self.block_tokens)

    def check_block_size(self, block_size: int) -> None:
        """Check that main blocks of so many tokens end where blocks of this pool do.

        So nobody ever writes to a block that a prefix needs.

        Raises:
            ValueError: They do not.
        """
        if block_size % self.block_tokens:
            raise ValueError(
                f"block_size: expected a multiple of {self.block_tokens}, the tokens of a block of pool {self.name}, "
                f"got {block_size}"
            )


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
        pool: Whose blocks it has; see CachePool.
    """

    role: str
    storage_name: str
    layer_ids: tuple[int, ...]
    block_shape: tuple[int, ...]
    dtype: str
    item_bytes: int
    layout_id: str
    pool: str = MAIN_POOL

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
