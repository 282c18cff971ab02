"""All writes of one layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops.reference.caches import index_key_write, mla_cache_write
from fastdeploy_dsa.ops.reference.indexer import index_query_quant
from fastdeploy_dsa.ops.types import CacheFormat, ScaleFormat

_FORMATS: dict[str, CacheFormat] = {"uint8": "fp8", "uint16": "bfloat16", "float32": "float32"}


def layer_write(
    *,
    latent: NDArray[Any],
    rope: NDArray[Any],
    latent_cache: NDArray[Any],
    key: NDArray[Any],
    index_cache: NDArray[Any],
    query: NDArray[Any],
    weights: NDArray[np.float32],
    slot_mapping: NDArray[np.int64],
    scale_format: ScaleFormat = "ue8m0",
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """mla_cache_write and index_key_write, in place, and index_query_quant in the format of index_cache.

    Returns:
        As index_query_quant.
    """
    mla_cache_write(latent=latent, rope=rope, cache=latent_cache, slot_mapping=slot_mapping, scale_format=scale_format)
    index_key_write(key=key, cache=index_cache, slot_mapping=slot_mapping, scale_format=scale_format)
    return index_query_quant(query=query, weights=weights, cache_format=_FORMATS[index_cache.dtype.name])
