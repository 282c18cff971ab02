from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import code_of, require_contiguous
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, SCALE_FORMAT_CODES, CpuOptions, ScaleFormat, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def index_key_write(
    *,
    key: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    scale_format: ScaleFormat = "ue8m0",
    cpu: CpuOptions = DEFAULT_CPU_OPTIONS,
) -> None:
    """Write index keys into the paged index-key cache, in place.

    Args:
        key: [T, index_head_dim] float32 or bfloat16, normalised and rotated.
        cache: [num_blocks, block_size, row] uint8 (fp8), bfloat16 or float32, contiguous; changed. An fp8 block holds
            its values first and then its scales: cache[block, offset] is not one token.
        slot_mapping: [T] int64, block * block_size + offset; slots outside the cache are not written.
        scale_format: How fp8 scales are chosen: the next power of two, or as they come. Ignored by other formats.
        cpu: How to run on the CPU.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or cache is not contiguous.

    Source: custom_ops/include/dsa/index_key_write.h
    """
    require_contiguous("cache", cache)
    scale_code = code_of("scale_format", scale_format, SCALE_FORMAT_CODES)
    run_op("dsa_index_key_write", key, cache, slot_mapping, scale_code, *codes_of(cpu))
