"""Arguments that fit, for every op, and what is said about each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle

from fastdeploy_dsa import ops

T, HEADS, BLOCKS, BLOCK_SIZE, TOPK = 3, 2, 4, 8, 5
LORA, ROPE, INDEX_DIM = 16, 8, 16
REQUESTS, MAX_BLOCKS = 2, 3
HEAD_DIM, RATIO, STATE_TOKENS = 24, 4, 4
Arguments = dict[str, Any]


def tensor(*shape: int, dtype: str = "float32") -> paddle.Tensor:
    return paddle.zeros(shape, dtype=dtype)


def ints(*values: int) -> paddle.Tensor:
    return paddle.to_tensor(values, dtype="int32")


def contexts() -> Arguments:
    return {
        "block_table": tensor(REQUESTS, MAX_BLOCKS, dtype="int32"),
        "request_ids": tensor(T, dtype="int32"),
        "lengths": paddle.full([T], 7, dtype="int32"),
    }


def index_query() -> Arguments:
    return {
        "query": paddle.randn([T, HEADS, INDEX_DIM]),
        "folded_weights": paddle.randn([T, HEADS]),
        "index_cache": paddle.randn([BLOCKS, BLOCK_SIZE, INDEX_DIM]),
    }


def on_the_cpu(make: Callable[[], Arguments]) -> Callable[[], Arguments]:
    """Make tensors on the CPU, also where Paddle would make them on a GPU."""

    def made() -> Arguments:
        device = paddle.get_device()
        paddle.set_device("cpu")
        try:
            return make()
        finally:
            paddle.set_device(device)

    return made


_FITTING: dict[str, Callable[[], Arguments]] = {
    "mla_cache_write": lambda: {
        "latent": paddle.randn([T, LORA]),
        "rope": paddle.randn([T, ROPE]),
        "cache": tensor(BLOCKS, 1, BLOCK_SIZE, LORA + ROPE),
        "slot_mapping": paddle.arange(T),
    },
    "index_key_write": lambda: {
        "key": paddle.randn([T, INDEX_DIM]),
        "cache": tensor(BLOCKS, BLOCK_SIZE, INDEX_DIM),
        "slot_mapping": paddle.arange(T),
    },
    "index_query_quant": lambda: {
        "query": paddle.randn([T, HEADS, INDEX_DIM]),
        "weights": paddle.randn([T, HEADS]),
        "cache_format": "fp8",
    },
    "layer_write": lambda: {
        "latent": paddle.randn([T, LORA]),
        "rope": paddle.randn([T, ROPE]),
        "latent_cache": tensor(BLOCKS, 1, BLOCK_SIZE, LORA + ROPE),
        "key": paddle.randn([T, INDEX_DIM]),
        "index_cache": tensor(BLOCKS, BLOCK_SIZE, INDEX_DIM),
        "query": paddle.randn([T, HEADS, INDEX_DIM]),
        "weights": paddle.randn([T, HEADS]),
        "slot_mapping": paddle.arange(T),
    },
    "indexer_logits": lambda: {**index_query(), **contexts(), "logits_width": 7},
    "topk_slots": lambda: {
        "logits": paddle.randn([T, 7]),
        **contexts(),
        "topk": TOPK,
        "num_blocks": BLOCKS,
        "block_size": BLOCK_SIZE,
    },
    "index_select": lambda: {**index_query(), **contexts(), "max_length": 7, "topk": TOPK},
    "sparse_mla": lambda: {
        "query": paddle.randn([T, HEADS, LORA + ROPE]),
        "latent_cache": paddle.randn([BLOCKS, 1, BLOCK_SIZE, LORA + ROPE]),
        "slot_ids": paddle.arange(T * TOPK, dtype="int32").reshape([T, TOPK]),
        "counts": paddle.full([T], TOPK, dtype="int32"),
        "kv_lora_rank": LORA,
        "softmax_scale": 0.1,
    },
    "compressed_row_write": lambda: {
        "rows": paddle.randn([T, HEAD_DIM]),
        "cache": tensor(BLOCKS, BLOCK_SIZE, HEAD_DIM),
        "slot_mapping": paddle.arange(T),
        "rope_dim": ROPE,
        "block_rows": BLOCK_SIZE,
    },
    "compressed_row_read": lambda: {
        "cache": paddle.randn([BLOCKS, BLOCK_SIZE, HEAD_DIM]),
        "slot_ids": paddle.arange(T),
        "head_dim": HEAD_DIM,
        "rope_dim": ROPE,
        "block_rows": BLOCK_SIZE,
    },
    "kv_compress": lambda: {
        "kv_score": paddle.randn([T, 4 * HEAD_DIM]),
        "ape": paddle.randn([RATIO, 2 * HEAD_DIM]),
        "norm_weight": paddle.randn([HEAD_DIM]),
        "cos": paddle.randn([T, ROPE // 2]),
        "sin": paddle.randn([T, ROPE // 2]),
        "state_cache": tensor(BLOCKS, STATE_TOKENS, 4 * HEAD_DIM),
        "state_table": paddle.to_tensor([[0, 1, 2], [3, 3, 3]], dtype="int32"),
        "positions": ints(1, 2, 3),
        "request_ids": tensor(T, dtype="int32"),
        "lengths": ints(2, 3, 4),
        "entry_cache": tensor(BLOCKS, BLOCK_SIZE, HEAD_DIM),
        "entry_slots": paddle.arange(T),
        "eps": 1e-6,
        "ratio": RATIO,
        "overlap": 2,
        "rope_dim": ROPE,
        "block_rows": BLOCK_SIZE,
        "entry_kind": "row",
    },
    "compressed_mla": lambda: {
        "query": paddle.randn([T, HEADS, HEAD_DIM]),
        "window_cache": paddle.randn([BLOCKS, BLOCK_SIZE, HEAD_DIM]),
        "window_slots": paddle.arange(T * TOPK, dtype="int32").reshape([T, TOPK]),
        "window_counts": paddle.full([T], TOPK, dtype="int32"),
        "window_block_rows": BLOCK_SIZE,
        "entry_cache": paddle.randn([BLOCKS, 2, HEAD_DIM]),
        "entry_slots": paddle.arange(T * 2, dtype="int32").reshape([T, 2]),
        "entry_counts": paddle.full([T], 2, dtype="int32"),
        "entry_block_rows": 2,
        "sinks": paddle.randn([HEADS]),
        "rope_dim": ROPE,
        "softmax_scale": 0.1,
    },
    "inverse_rope": lambda: {
        "x": paddle.randn([T, HEADS, HEAD_DIM]),
        "cos": paddle.randn([T, ROPE // 2]),
        "sin": paddle.randn([T, ROPE // 2]),
    },
    "block_copy": lambda: {
        "src": paddle.randn([BLOCKS, BLOCK_SIZE, 3]),
        "dst": tensor(BLOCKS, BLOCK_SIZE, 3),
        "src_block_ids": paddle.to_tensor([0, 3]),
        "dst_block_ids": paddle.to_tensor([2, 1]),
    },
}
# Arguments that fit, built anew for every test.
FITTING = {op: on_the_cpu(make) for op, make in _FITTING.items()}
IN_PLACE = {
    "mla_cache_write": ("cache",),
    "index_key_write": ("cache",),
    "layer_write": ("latent_cache", "index_cache"),
    "compressed_row_write": ("cache",),
    "kv_compress": ("state_cache", "entry_cache"),
    "inverse_rope": ("x",),
    "block_copy": ("dst",),
}
# Arguments of which None says that there is none.
OPTIONAL = {("compressed_mla", name) for name in ("entry_cache", "entry_slots", "entry_counts")}
# Blocks are copied as bytes: the two arenas take any dtype and any shape, as long as they agree.
ARENAS = {("block_copy", "src"), ("block_copy", "dst")}
TENSORS = [
    (op, name) for op, fitting in FITTING.items() for name, value in fitting().items() if hasattr(value, "shape")
]


def call(op: str, arguments: Arguments) -> Any:
    return getattr(ops, op)(**arguments)


TARGETS = [(op, name) for op, names in IN_PLACE.items() for name in names]


def outputs(op: str, arguments: Arguments) -> list[np.ndarray]:
    """Everything that a call produces, as arrays."""
    result = call(op, arguments)
    tensors = [] if result is None else [result] if isinstance(result, paddle.Tensor) else list(result)
    return [x.numpy() for x in (*tensors, *(arguments[name] for name in IN_PLACE.get(op, ())))]
