"""What the cases of several ops are made of."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference.caches import SCALE_BYTES, LatentFields
from tests.kit.poison import fill_with_invalid_ids, poisoned_blocks

Arguments = dict[str, Any]
Format = Literal["fp8", "bfloat16", "float32"]
DTYPES: dict[str, DTypeLike] = {"fp8": np.uint8, "bfloat16": np.uint16, "float32": np.float32}
SPARE_BLOCKS = 3
SPARE_COLUMNS = 5


def numbers_as(values: NDArray[np.float32], input_format: str) -> NDArray[Any]:
    """Float32 numbers in an input format."""
    return reference.bf16_encode(values) if input_format == "bfloat16" else values.astype(np.float32)


def rows_of_many_sizes(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Normal numbers whose rows differ in size by up to 2^12, as scales must follow."""
    sizes = np.exp2(rng.uniform(-6, 6, (*shape[:-1], 1)))
    return (rng.standard_normal(shape) * sizes).astype(np.float32)


def latent_cache(
    num_blocks: int, block_size: int, kv_lora_rank: int, qk_rope_head_dim: int, cache_format: str, gap_bytes: int = 0
) -> NDArray[Any]:
    """A poisoned latent cache [num_blocks, 1, block_size, row]."""
    width = kv_lora_rank + qk_rope_head_dim
    if cache_format == "fp8":
        width = LatentFields(kv_lora_rank, qk_rope_head_dim).row_bytes
    return poisoned_blocks(num_blocks, (1, block_size, width), DTYPES[cache_format], gap_bytes=gap_bytes)


def index_cache(
    num_blocks: int, block_size: int, index_head_dim: int, cache_format: str, gap_bytes: int = 0
) -> NDArray[Any]:
    """A poisoned index cache [num_blocks, block_size, index_head_dim and, for fp8, scale]."""
    width = index_head_dim + (SCALE_BYTES if cache_format == "fp8" else 0)
    return poisoned_blocks(num_blocks, (block_size, width), DTYPES[cache_format], gap_bytes=gap_bytes)


def slot_mapping_with_invalid_ids(rng: np.random.Generator, num_tokens: int, num_slots: int) -> NDArray[np.int64]:
    """Distinct slots in random order; every fifth is an id outside the cache."""
    slots = rng.permutation(num_slots)[:num_tokens].astype(np.int64)
    fill_with_invalid_ids(slots, np.arange(num_tokens) % 5 == 3, num_slots)
    return slots
