from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import code_of, require_contiguous
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, SCALE_FORMAT_CODES, CpuOptions, ScaleFormat, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def layer_write(
    *,
    latent: Tensor,
    rope: Tensor,
    latent_cache: Tensor,
    key: Tensor,
    index_cache: Tensor,
    query: Tensor,
    weights: Tensor,
    slot_mapping: Tensor,
    scale_format: ScaleFormat = "ue8m0",
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> tuple[Tensor, Tensor]:
    """Write a token's rows into both caches, in place, and bring its index query into the format of the index cache.

    Bit for bit mla_cache_write, index_key_write and index_query_quant, as one launch on a GPU. A layer without an
    indexer has only the first of them to call.

    Args:
        latent: [T, kv_lora_rank] float32 or bfloat16, normalised.
        rope: [T, qk_rope_head_dim], dtype of latent, rotated.
        latent_cache: [num_blocks, 1, block_size, row] uint8 (fp8), bfloat16 or float32, contiguous; changed.
        key: [T, index_head_dim] float32 or bfloat16, normalised and rotated.
        index_cache: [num_blocks, block_size, row] uint8 (fp8), bfloat16 or float32, contiguous; changed.
        query: [T, index_n_heads, index_head_dim] float32 or bfloat16, rotated.
        weights: [T, index_n_heads] float32, as the weights projection gives them.
        slot_mapping: [T] int64, block * block_size + offset; slots outside a cache are not written.
        scale_format: How fp8 scales of both caches are chosen: the next power of two, or as they come.
        cpu: How to run on the CPU.

    Returns:
        The queries, [T, index_n_heads, index_head_dim] dtype of index_cache (uint8: e4m3 bytes).
        The folded weights, [T, index_n_heads] float32.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or a cache is not contiguous; nothing was written.

    Source: custom_ops/include/dsa/layer_write.h
    """
    require_contiguous("latent_cache", latent_cache)
    require_contiguous("index_cache", index_cache)
    scale_code = code_of("scale_format", scale_format, SCALE_FORMAT_CODES)
    _, _, quantized, folded_weights = run_op(
        "dsa_layer_write",
        latent,
        rope,
        latent_cache,
        key,
        index_cache,
        query,
        weights,
        slot_mapping,
        scale_code,
        *codes_of(cpu),
    )
    return quantized, folded_weights
