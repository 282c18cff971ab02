"""The definition of every op, in NumPy: slow, short and exact.

The functions have the names and parameters of fastdeploy_dsa.ops without `cpu` and `batch_invariant`. Arrays carry the
formats: uint8 is packed e4m3 (or a cache of bytes), uint16 is packed bfloat16, float32 is itself. Number formats are
exact to the bit; scores and attention are computed and returned in float64. Caches may have blocks that lie further
apart than their size. Paddle is not imported.
"""

from fastdeploy_dsa.ops.reference.attention import merge_attention, sparse_mla
from fastdeploy_dsa.ops.reference.caches import (
    block_copy,
    index_key_write,
    mla_cache_write,
    read_index_keys,
    read_latent_rows,
)
from fastdeploy_dsa.ops.reference.compressed import (
    compressed_mla,
    compressed_row_read,
    compressed_row_write,
    inverse_rope,
    kv_compress,
)
from fastdeploy_dsa.ops.reference.indexer import (
    IndexSelection,
    index_query_quant,
    index_select,
    indexer_logits,
    topk_slots,
)
from fastdeploy_dsa.ops.reference.layer import layer_write
from fastdeploy_dsa.ops.reference.number_formats import (
    bf16_decode,
    bf16_encode,
    bf16_round,
    ceil_pow2,
    decode,
    e4m3_decode,
    e4m3_encode,
)

__all__ = [
    "IndexSelection",
    "bf16_decode",
    "bf16_encode",
    "bf16_round",
    "block_copy",
    "ceil_pow2",
    "compressed_mla",
    "compressed_row_read",
    "compressed_row_write",
    "decode",
    "e4m3_decode",
    "e4m3_encode",
    "index_key_write",
    "index_query_quant",
    "index_select",
    "indexer_logits",
    "inverse_rope",
    "kv_compress",
    "layer_write",
    "merge_attention",
    "mla_cache_write",
    "read_index_keys",
    "read_latent_rows",
    "sparse_mla",
    "topk_slots",
]
