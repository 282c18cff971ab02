"""Writing, reading and copying the two paged caches; the bytes are those of custom_ops/include/dsa/cache_layout.h."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops.reference.number_formats import (
    E4M3_MAX,
    Float32Array,
    bf16_decode,
    bf16_encode,
    bf16_round,
    ceil_pow2,
    decode,
    e4m3_decode,
    e4m3_encode,
    encode_as,
)
from fastdeploy_dsa.ops.types import ScaleFormat

LATENT_GROUP = 128
SCALE_BYTES = 4
AMAX_FLOOR = np.float32(1e-4)  # of an index vector
LATENT_SCALE_FLOOR = np.float32(1e-4)  # of a latent group with ue8m0 scales
PLAIN_SCALE_FLOOR = np.float32(2.0**-126)  # of a latent group with plain scales


@dataclass(frozen=True)
class LatentFields:
    """Byte offsets inside an fp8 latent row: e4m3 numbers, padding to 4, scales, bfloat16 rope, padding to 4."""

    kv_lora_rank: int
    qk_rope_head_dim: int

    @property
    def num_groups(self) -> int:
        """Groups of numbers that share a scale; the last may be shorter."""
        return -(-self.kv_lora_rank // LATENT_GROUP)

    @property
    def scale_offset(self) -> int:
        """First byte of the scales."""
        return -(-self.kv_lora_rank // SCALE_BYTES) * SCALE_BYTES

    @property
    def rope_offset(self) -> int:
        """First byte of the bfloat16 rope."""
        return self.scale_offset + self.num_groups * SCALE_BYTES

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.rope_offset + -(-2 * self.qk_rope_head_dim // SCALE_BYTES) * SCALE_BYTES


def index_scale(amax: Float32Array, scale_format: ScaleFormat = "ue8m0") -> Float32Array:
    """Scale of an index vector whose largest magnitude is amax; rules S26 and S27."""
    wanted = np.maximum(amax, AMAX_FLOOR) / E4M3_MAX
    return ceil_pow2(wanted) if scale_format == "ue8m0" else wanted


def latent_scale(amax: Float32Array, scale_format: ScaleFormat = "ue8m0") -> Float32Array:
    """Scale of a latent group whose largest magnitude is amax; rule S28."""
    if scale_format == "ue8m0":
        return ceil_pow2(np.maximum(amax / E4M3_MAX, LATENT_SCALE_FLOOR))
    plain: Float32Array = np.maximum(amax / E4M3_MAX, PLAIN_SCALE_FLOOR)
    return plain


def mla_cache_write(
    *,
    latent: NDArray[Any],
    rope: NDArray[Any],
    cache: NDArray[Any],
    slot_mapping: NDArray[np.int64],
    scale_format: ScaleFormat = "ue8m0",
) -> None:
    """Pack rows into the latent cache, in place; slots outside the cache are skipped.

    Args:
        latent: [T, kv_lora_rank] float32 or uint16 (bfloat16).
        rope: [T, qk_rope_head_dim] of the same dtype.
        cache: [num_blocks, 1, block_size, row] uint8, uint16 or float32.
        slot_mapping: [T] int64, block * block_size + offset.
        scale_format: Of an fp8 cache.
    """
    blocks, offsets, tokens = _places(slot_mapping, cache.shape[0], cache.shape[2])
    values, rotated = decode(latent)[tokens], decode(rope)[tokens]
    rows = cache[:, 0]
    if cache.dtype != np.uint8:
        rows[blocks, offsets] = encode_as(np.concatenate([values, rotated], -1), cache.dtype)
        return
    fields = LatentFields(latent.shape[1], rope.shape[1])
    rows[blocks, offsets] = 0  # the padding: equal tokens give equal rows
    rounded = bf16_round(values)
    amax = np.stack([np.abs(group).max(-1) for group in _groups(rounded)], -1)
    scales = latent_scale(amax, scale_format)
    spread = np.repeat(scales, LATENT_GROUP, axis=-1)[:, : fields.kv_lora_rank]
    rows[blocks, offsets, : fields.kv_lora_rank] = e4m3_encode(rounded / spread)
    rows[blocks, offsets, fields.scale_offset : fields.rope_offset] = _as_bytes(scales)
    rope_bytes = _as_bytes(bf16_encode(rotated))
    rows[blocks, offsets, fields.rope_offset : fields.rope_offset + rope_bytes.shape[1]] = rope_bytes


def index_key_write(
    *,
    key: NDArray[Any],
    cache: NDArray[Any],
    slot_mapping: NDArray[np.int64],
    scale_format: ScaleFormat = "ue8m0",
) -> None:
    """Pack keys into the index cache, in place; slots outside the cache are skipped.

    Args:
        key: [T, index_head_dim] float32 or uint16 (bfloat16).
        cache: [num_blocks, block_size, index_head_dim + 4] uint8, else [.., index_head_dim] uint16 or float32.
        slot_mapping: [T] int64, block * block_size + offset.
        scale_format: Of an fp8 cache.
    """
    blocks, offsets, tokens = _places(slot_mapping, cache.shape[0], cache.shape[1])
    values = decode(key)[tokens]
    if cache.dtype != np.uint8:
        cache[blocks, offsets] = encode_as(values, cache.dtype)
        return
    rounded = bf16_round(values)
    scales = index_scale(np.abs(rounded).max(-1), scale_format)
    numbers, stored_scales = index_block_fields(cache)
    numbers[blocks, offsets] = e4m3_encode(rounded / scales[:, None])
    stored_scales[blocks, offsets] = scales


def index_block_fields(cache: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Float32Array]:
    """Views of an fp8 index cache: all numbers of a block [nb, bs, dim] come before all its scales [nb, bs]."""
    num_blocks, block_size, width = cache.shape
    dim = width - SCALE_BYTES
    flat = cache.reshape(num_blocks, block_size * width)
    numbers = flat[:, : block_size * dim].reshape(num_blocks, block_size, dim)
    return numbers, flat[:, block_size * dim :].view(np.float32)


def read_latent_rows(
    cache: NDArray[Any], slot_ids: NDArray[Any], kv_lora_rank: int, qk_rope_head_dim: int
) -> Float32Array:
    """Rows of valid slots as attention sees them.

    Args:
        cache: As mla_cache_write takes it.
        slot_ids: [n], all inside the cache.
        kv_lora_rank: Numbers of the latent part.
        qk_rope_head_dim: Numbers of the rotated part.

    Returns:
        [n, kv_lora_rank + qk_rope_head_dim] float32; an fp8 number is bfloat16(e4m3 * scale).
    """
    block_size = cache.shape[2]
    rows = cache[:, 0][slot_ids // block_size, slot_ids % block_size]
    if cache.dtype != np.uint8:
        return decode(rows)
    fields = LatentFields(kv_lora_rank, qk_rope_head_dim)
    scales = np.ascontiguousarray(rows[:, fields.scale_offset : fields.rope_offset]).view(np.float32)
    spread = np.repeat(scales, LATENT_GROUP, axis=-1)[:, :kv_lora_rank]
    latent = bf16_round(e4m3_decode(rows[:, :kv_lora_rank]) * spread)
    rope = rows[:, fields.rope_offset : fields.rope_offset + 2 * qk_rope_head_dim]
    return np.concatenate([latent, bf16_decode(np.ascontiguousarray(rope).view(np.uint16))], -1)


def read_index_keys(cache: NDArray[Any], slot_ids: NDArray[Any]) -> tuple[Float32Array, Float32Array]:
    """Unscaled keys [n, index_head_dim] and scales [n] of valid slots; the scale is 1 in an unquantised cache."""
    block_size = cache.shape[1]
    blocks, offsets = slot_ids // block_size, slot_ids % block_size
    if cache.dtype != np.uint8:
        return decode(cache[blocks, offsets]), np.ones(len(slot_ids), np.float32)
    numbers, scales = index_block_fields(cache)
    return e4m3_decode(numbers[blocks, offsets]), scales[blocks, offsets]


def block_copy(
    *,
    src: NDArray[Any],
    dst: NDArray[Any],
    src_block_ids: NDArray[np.int64],
    dst_block_ids: NDArray[np.int64],
) -> None:
    """Copy dst[dst_block_ids[i]] = src[src_block_ids[i]] for every i, in place.

    Raises:
        ValueError: A block id lies outside its arena; nothing was copied.
    """
    for name, ids, arena in (("src_block_ids", src_block_ids, src), ("dst_block_ids", dst_block_ids, dst)):
        outside = ids[(ids < 0) | (ids >= len(arena))]
        if outside.size:
            raise ValueError(f"{name}: expected ids in [0, {len(arena)}), got {outside[0]}")
    dst[dst_block_ids] = src[src_block_ids]


def _places(
    slot_mapping: NDArray[np.int64], num_blocks: int, block_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Block, offset and token of every slot that lies inside the cache."""
    tokens = np.flatnonzero((slot_mapping >= 0) & (slot_mapping < num_blocks * block_size))
    slots = slot_mapping[tokens]
    return slots // block_size, slots % block_size, tokens


def _groups(values: Float32Array) -> list[Float32Array]:
    return [values[:, first : first + LATENT_GROUP] for first in range(0, values.shape[1], LATENT_GROUP)]


def _as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).view(np.uint8)
