"""Byte layouts of the caches: the only Python file that knows byte counts.

A layout is a list of fields with an arrangement; offsets, sizes, tensor shapes and specs derive from it.
`custom_ops/include/dsa/cache_layout.h` says the same for the kernels, and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cache_manager import CacheTensorSpec
from fastdeploy_dsa.index_schedule import IndexSchedule
from fastdeploy_dsa.ops import CacheFormat, ScaleFormat

CACHE_FORMATS: tuple[CacheFormat, ...] = get_args(CacheFormat)

LATENT_GROUP = 128  # numbers of a latent row that share one scale
MAX_FP8_INDEX_HEAD_DIM = 128  # one scale a token; more dims would need scales inside the head sum
MIN_FP8_BLOCK_MULTIPLE = 4  # float32 scales behind a block's values stay aligned

ITEM_BYTES = {"e4m3": 1, "uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class ByteField:
    """Numbers of one kind that a token has in a cache entry."""

    name: str
    dtype: str
    count: int

    @property
    def num_bytes(self) -> int:
        """Bytes per token."""
        return self.count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TokenLayout:
    """The fields of a token and how tokens of a block are arranged.

    Attributes:
        name: The field's name for this layout, part of the layout id.
        fields: In storage order.
        arrangement: "per_token": one token's fields after another's.
            "per_block": a field of all tokens, then the next field of all tokens.
            "tail_scales": all fields but the last, token after token, then the last field of all tokens.
        alignment: Every field is filled up to a multiple of this many bytes.
    """

    name: str
    fields: tuple[ByteField, ...]
    arrangement: Literal["per_token", "per_block", "tail_scales"]
    alignment: int = 1

    def field_offset(self, name: str, block_size: int = 1) -> int:
        """Byte offset of the first token's field in a block of that many tokens."""
        offset = 0
        for together in self._groups:
            for field in together:
                if field.name == name:
                    return offset
                offset += self._field_bytes(field)
            offset += (block_size - 1) * sum(map(self._field_bytes, together))
        raise KeyError(name)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return sum(self._field_bytes(field) for field in self.fields)

    @property
    def _groups(self) -> tuple[tuple[ByteField, ...], ...]:
        """Fields that lie side by side for each token; a group of all tokens comes before the next group."""
        if self.arrangement == "per_token":
            return (self.fields,)
        if self.arrangement == "per_block":
            return tuple((field,) for field in self.fields)
        return (self.fields[:-1], self.fields[-1:])

    def _field_bytes(self, field: ByteField) -> int:
        return -(-field.num_bytes // self.alignment) * self.alignment


@dataclass(frozen=True)
class CacheSpan:
    """A cache tensor and the tokens it covers.

    Attributes:
        spec: The tensor.
        block_tokens: Tokens of the request that one block covers.
        data_bytes: Bytes of a block without the padding at its end.
        live_tokens: How many of a request's last tokens it must hold; None: all of them.
    """

    spec: CacheTensorSpec
    block_tokens: int
    data_bytes: int
    live_tokens: int | None = None

    @property
    def bytes_per_token(self) -> float:
        """Bytes in one layer that every further token of a request takes."""
        return self.spec.bytes_per_block / self.block_tokens if self.live_tokens is None else 0.0

    @property
    def unpadded_bytes_per_token(self) -> float:
        return self.data_bytes / self.block_tokens if self.live_tokens is None else 0.0

    @property
    def live_bytes(self) -> int:
        """Bytes in one layer of the rows a request must keep of its last tokens; 0 where all tokens are kept."""
        return 0 if self.live_tokens is None else self.live_tokens * self.data_bytes // self.block_tokens

    def blocks(self, num_tokens: int) -> int:
        """Most blocks that a request of so many tokens holds; a window may begin in the middle of a block."""
        blocks = -(-num_tokens // self.block_tokens)
        return blocks if self.live_tokens is None else min(blocks, -(-(self.live_tokens - 1) // self.block_tokens) + 1)


def latent_layout(cache_format: CacheFormat, kv_lora_rank: int, qk_rope_head_dim: int) -> TokenLayout:
    """One token's row of the latent cache: 656, 1152 or 2304 bytes for 512 + 64.

    Source: FlashMLA's fp8 cache of DeepSeek-V3.2; rule S41.
    """
    if cache_format != "fp8":
        parts = (ByteField("latent", cache_format, kv_lora_rank), ByteField("rope", cache_format, qk_rope_head_dim))
        return TokenLayout(cache_format, parts, "per_token")
    fields = (
        ByteField("latent", "e4m3", kv_lora_rank),
        ByteField("scale", "float32", -(-kv_lora_rank // LATENT_GROUP)),
        ByteField("rope", "bfloat16", qk_rope_head_dim),
    )
    return TokenLayout("fp8_ds_mla", fields, "per_token", alignment=ITEM_BYTES["float32"])


def index_layout(cache_format: CacheFormat, index_head_dim: int) -> TokenLayout:
    """One token's key in the index cache: 132, 256 or 512 bytes for 128 dims.

    Source: DeepGEMM's paged index keys of DeepSeek-V3.2; rule S42.
    """
    if cache_format == "fp8":
        if index_head_dim > MAX_FP8_INDEX_HEAD_DIM:
            raise ValueError(
                f"index_head_dim: an fp8 index cache takes at most {MAX_FP8_INDEX_HEAD_DIM}, got {index_head_dim}"
            )
        fields = (ByteField("key", "e4m3", index_head_dim), ByteField("scale", "float32", 1))
        return TokenLayout(f"fp8_{index_head_dim + ITEM_BYTES['float32']}", fields, "per_block")
    return TokenLayout(cache_format, (ByteField("key", cache_format, index_head_dim),), "per_block")


def latent_spec(
    layout: TokenLayout, layer_ids: tuple[int, ...], block_size: int, scale_format: ScaleFormat = "ue8m0"
) -> CacheTensorSpec:
    """Spec of role "key" over latent rows: [num_blocks, 1, block_size, row]."""
    dtype, width = _tensor_row(layout)
    return CacheTensorSpec(
        role="key",
        storage_name="key_caches",
        layer_ids=layer_ids,
        block_shape=(1, block_size, width),
        dtype=dtype,
        item_bytes=ITEM_BYTES[dtype],
        layout_id=_layout_id("key", layout, block_size, scale_format),
    )


def index_spec(
    layout: TokenLayout, layer_ids: tuple[int, ...], block_size: int, scale_format: ScaleFormat = "ue8m0"
) -> CacheTensorSpec:
    """Spec of role "indexer": [num_blocks, block_size, key bytes and scale bytes]; NOT one token after another."""
    if layout.name.startswith("fp8") and block_size % MIN_FP8_BLOCK_MULTIPLE:
        raise ValueError(
            f"block_size: an fp8 index cache needs a multiple of {MIN_FP8_BLOCK_MULTIPLE}, got {block_size}"
        )
    dtype, width = _tensor_row(layout)
    return CacheTensorSpec(
        role="indexer",
        storage_name="indexer_caches",
        layer_ids=layer_ids,
        block_shape=(block_size, width),
        dtype=dtype,
        item_bytes=ITEM_BYTES[dtype],
        layout_id=_layout_id("indexer", layout, block_size, scale_format),
    )


def mla_specs(
    *,
    cache_format: CacheFormat,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    layer_ids: tuple[int, ...],
    block_size: int,
) -> tuple[CacheTensorSpec, ...]:
    """Specs of latent attention: role "key" on every layer."""
    layout = latent_layout(cache_format, kv_lora_rank, qk_rope_head_dim)
    return (latent_spec(layout, layer_ids, block_size),)


def dsa_specs(
    *,
    cache_format: CacheFormat,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    index_head_dim: int,
    index_schedule: IndexSchedule,
    layer_ids: tuple[int, ...],
    block_size: int,
) -> tuple[CacheTensorSpec, ...]:
    """Specs of latent attention to a selection: role "key" on every layer, "indexer" on those that own an indexer."""
    owners = owning_layers(index_schedule, layer_ids)
    keys = mla_specs(
        cache_format=cache_format,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        layer_ids=layer_ids,
        block_size=block_size,
    )
    return (*keys, index_spec(index_layout(cache_format, index_head_dim), owners, block_size))


def owning_layers(index_schedule: IndexSchedule, layer_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the layers that select by themselves: full layers of the schedule, and draft layers, beyond it."""
    num_backbone = len(index_schedule.letters)
    return tuple(layer for layer in layer_ids if layer >= num_backbone or index_schedule.is_full(layer))


def head_specs(
    *,
    layer_ids: tuple[int, ...],
    kv_num_heads: int,
    head_dim: int,
    block_size: int,
    dtype: str,
    scale_dtype: str | None = None,
) -> tuple[CacheTensorSpec, ...]:
    """Specs of per-head keys and values [num_blocks, kv_num_heads, block_size, head_dim], scales behind them.

    Args:
        layer_ids: Absolute ids.
        kv_num_heads: Key-value heads on this rank.
        head_dim: Numbers of a head.
        block_size: Tokens of a block.
        dtype: Element type of keys and values.
        scale_dtype: Element type of the per-token scales of a quantised cache; None: no scales.
    """
    tensors: list[tuple[str, str, str, tuple[int, ...]]] = [
        ("key", "key_caches", dtype, (head_dim,)),
        ("value", "value_caches", dtype, (head_dim,)),
    ]
    if scale_dtype is not None:
        tensors += [
            ("key_scale", "key_cache_scales", scale_dtype, ()),
            ("value_scale", "value_cache_scales", scale_dtype, ()),
        ]
    return tuple(
        CacheTensorSpec(
            role=role,
            storage_name=storage_name,
            layer_ids=layer_ids,
            block_shape=(kv_num_heads, block_size, *tail),
            dtype=tensor_dtype,
            item_bytes=ITEM_BYTES[tensor_dtype],
            layout_id=f"{role}/{tensor_dtype}/bs{block_size}",
        )
        for role, storage_name, tensor_dtype, tail in tensors
    )


def _tensor_row(layout: TokenLayout) -> tuple[str, int]:
    """Element type and width of the tensor that holds a layout: bytes for fp8, else the numbers themselves."""
    dtypes = {field.dtype for field in layout.fields}
    if "e4m3" in dtypes:
        return "uint8", layout.token_bytes
    (dtype,) = dtypes
    return dtype, sum(field.count for field in layout.fields)


def _layout_id(role: str, layout: TokenLayout, block_size: int, scale_format: ScaleFormat) -> str:
    """Rule S44; had0: index vectors are stored without a Hadamard rotation."""
    return f"{role}/{layout.name}/bs{block_size}/{scale_format}/had0"
