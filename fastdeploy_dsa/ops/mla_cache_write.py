from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import code_of, require_contiguous
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, SCALE_FORMAT_CODES, CpuOptions, ScaleFormat, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def mla_cache_write(
    *,
    latent: Tensor,
    rope: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    scale_format: ScaleFormat = "ue8m0",
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> None:
    """Write latent rows into the paged latent cache, in place.

    Args:
        latent: [T, kv_lora_rank] float32 or bfloat16, normalised.
        rope: [T, qk_rope_head_dim], dtype of latent, rotated.
        cache: [num_blocks, 1, block_size, row] uint8 (fp8), bfloat16 or float32, contiguous; changed. A row holds what
            custom_ops/include/dsa/cache_layout.h says.
        slot_mapping: [T] int64, block * block_size + offset; slots outside the cache are not written.
        scale_format: How fp8 scales are chosen: the next power of two, or as they come. Ignored by other formats.
        cpu: How to run on the CPU.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or cache is not contiguous.

    Source: custom_ops/include/dsa/mla_cache_write.h
    """
    require_contiguous("cache", cache)
    scale_code = code_of("scale_format", scale_format, SCALE_FORMAT_CODES)
    run_op("dsa_mla_cache_write", latent, rope, cache, slot_mapping, scale_code, *codes_of(cpu))
