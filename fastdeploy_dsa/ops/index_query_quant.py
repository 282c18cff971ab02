from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import code_of
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import CACHE_FORMAT_CODES, DEFAULT_CPU_OPTIONS, CacheFormat, CpuOptions, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def index_query_quant(
    *, query: Tensor, weights: Tensor, cache_format: CacheFormat, cpu: CpuOptions = DEFAULT_CPU_OPTIONS
) -> tuple[Tensor, Tensor]:
    """Bring index queries into the format of the index cache and fold every factor of a score into the head weights.

    Args:
        query: [T, index_n_heads, index_head_dim] float32 or bfloat16, rotated.
        weights: [T, index_n_heads] float32, as the weights projection gives them.
        cache_format: That of the index cache.
        cpu: How to run on the CPU.

    Returns:
        The queries, [T, index_n_heads, index_head_dim] uint8 (e4m3 bytes), bfloat16 or float32.
        The folded weights, [T, index_n_heads] float32.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or the format is unknown.

    Source: custom_ops/include/dsa/index_query_quant.h
    """
    format_code = code_of("cache_format", cache_format, CACHE_FORMAT_CODES)
    quantized, folded_weights = run_op("dsa_index_query_quant", query, weights, format_code, *codes_of(cpu))
    return quantized, folded_weights
