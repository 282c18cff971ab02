"""One typed function per op, over Paddle tensors. Importing this package does not import paddle.

Rules of every op
    - Inputs that are not contiguous are read through a contiguous copy that Paddle makes; tensors that are written in
      place must be contiguous.
    - All tensors of a call lie on one device, the CPU or a GPU, and the outputs lie there, too. On a GPU the op runs
      on Paddle's current stream, does not wait for it, and may be captured in a graph.
    - A user's mistake is a ValueError that names the argument, what was expected and what came. On a GPU nobody looks
      at the values inside tensors: what a wrong length, count or id does there stands in the op's header.
    - An empty batch is valid.
    - Nothing is recorded for a backward pass.
"""

from fastdeploy_dsa.ops.block_copy import block_copy
from fastdeploy_dsa.ops.compressed_mla import compressed_mla
from fastdeploy_dsa.ops.compressed_row_read import compressed_row_read
from fastdeploy_dsa.ops.compressed_row_write import compressed_row_write
from fastdeploy_dsa.ops.index_key_write import index_key_write
from fastdeploy_dsa.ops.index_query_quant import index_query_quant
from fastdeploy_dsa.ops.index_select import index_select
from fastdeploy_dsa.ops.indexer_logits import indexer_logits
from fastdeploy_dsa.ops.inverse_rope import inverse_rope
from fastdeploy_dsa.ops.kv_compress import kv_compress
from fastdeploy_dsa.ops.layer_write import layer_write
from fastdeploy_dsa.ops.mla_cache_write import mla_cache_write
from fastdeploy_dsa.ops.sparse_mla import sparse_mla
from fastdeploy_dsa.ops.topk_slots import topk_slots
from fastdeploy_dsa.ops.types import CacheFormat, CpuOptions, EntryKind, IndexSelection, Isa, ScaleFormat

__all__ = [
    "CacheFormat",
    "CpuOptions",
    "EntryKind",
    "IndexSelection",
    "Isa",
    "ScaleFormat",
    "block_copy",
    "compressed_mla",
    "compressed_row_read",
    "compressed_row_write",
    "index_key_write",
    "index_query_quant",
    "index_select",
    "indexer_logits",
    "inverse_rope",
    "kv_compress",
    "layer_write",
    "mla_cache_write",
    "sparse_mla",
    "topk_slots",
]
