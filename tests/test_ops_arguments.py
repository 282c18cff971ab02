"""Every op refuses arguments that do not fit, naming the argument, and takes those that fit in any memory layout.

What the ops compute is tested in tests/ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_dsa import ops
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import (
    CACHE_FORMAT_CODES,
    ENTRY_KIND_CODES,
    ISA_CODES,
    MAX_THREADS,
    SCALE_FORMAT_CODES,
    CpuOptions,
)
from tests.kit.headers import Headers

T, HEADS, BLOCKS, BLOCK_SIZE, TOPK = 3, 2, 4, 8, 5
LORA, ROPE, INDEX_DIM = 16, 8, 16
REQUESTS, MAX_BLOCKS = 2, 3
HEAD_DIM, RATIO, STATE_TOKENS = 24, 4, 4

Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def tensors_on_the_cpu() -> Iterator[None]:
    """Where values inside tensors are refused, too; a Paddle with a GPU would put tensors there."""
    device = paddle.get_device()
    paddle.set_device("cpu")
    yield
    paddle.set_device(device)


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
# (op, argument, axis) whose size no other argument has, so that any size fits.
FREE_AXES = {
    ("mla_cache_write", "cache", 0),
    ("mla_cache_write", "cache", 2),
    ("index_key_write", "cache", 0),
    ("index_key_write", "cache", 1),
    ("index_query_quant", "query", 2),
    ("indexer_logits", "index_cache", 0),
    ("indexer_logits", "index_cache", 1),
    ("indexer_logits", "block_table", 0),
    ("indexer_logits", "block_table", 1),
    ("topk_slots", "logits", 1),
    ("topk_slots", "block_table", 0),
    ("topk_slots", "block_table", 1),
    ("index_select", "index_cache", 0),
    ("index_select", "index_cache", 1),
    ("index_select", "block_table", 0),
    ("index_select", "block_table", 1),
    ("sparse_mla", "query", 1),
    ("sparse_mla", "latent_cache", 0),
    ("sparse_mla", "latent_cache", 2),
    ("sparse_mla", "slot_ids", 1),
    ("compressed_row_write", "cache", 0),
    ("compressed_row_read", "cache", 0),
    ("compressed_row_read", "slot_ids", 0),
    ("kv_compress", "state_cache", 0),
    ("kv_compress", "state_cache", 1),
    ("kv_compress", "state_table", 0),
    ("kv_compress", "state_table", 1),
    ("kv_compress", "entry_cache", 0),
    ("compressed_mla", "window_cache", 0),
    ("compressed_mla", "window_slots", 1),
    ("compressed_mla", "entry_cache", 0),
    ("compressed_mla", "entry_slots", 1),
    ("inverse_rope", "x", 1),
    ("inverse_rope", "x", 2),
    ("block_copy", "src", 0),
    ("block_copy", "dst", 0),
}
TENSORS = [
    (op, name) for op, fitting in FITTING.items() for name, value in fitting().items() if hasattr(value, "shape")
]
AXES = [(op, name, axis) for op, name in TENSORS for axis in range(FITTING[op]()[name].ndim)]
ROW_OPS = ("compressed_row_write", "compressed_row_read", "kv_compress", "compressed_mla")
BLOCK_ROWS = [
    *((op, "block_rows") for op in ROW_OPS[:3]),
    ("compressed_mla", "window_block_rows"),
    ("compressed_mla", "entry_block_rows"),
]
NUMBERS = [
    # op, argument, value that does not fit
    ("mla_cache_write", "scale_format", "e8m0"),
    ("index_key_write", "scale_format", "e8m0"),
    ("layer_write", "scale_format", "e8m0"),
    ("index_query_quant", "cache_format", "float16"),
    ("indexer_logits", "logits_width", -1),
    ("topk_slots", "topk", 0),
    ("topk_slots", "topk", 1 << 31),
    ("topk_slots", "num_blocks", -1),
    ("topk_slots", "block_size", 0),
    ("index_select", "max_length", -1),
    ("index_select", "topk", 0),
    ("index_select", "max_logits_bytes", -1),
    ("sparse_mla", "kv_lora_rank", 0),
    ("sparse_mla", "kv_lora_rank", LORA + ROPE),
    ("sparse_mla", "softmax_scale", float("nan")),
    ("sparse_mla", "softmax_scale", float("inf")),
    ("sparse_mla", "softmax_scale", 1e39),
    ("sparse_mla", "softmax_scale", -(10**400)),
    ("sparse_mla", "softmax_scale", "0.1"),
    ("sparse_mla", "softmax_scale", None),
    ("sparse_mla", "softmax_scale", True),
    ("sparse_mla", "softmax_scale", 1j),
    ("sparse_mla", "batch_invariant", 1),
    ("sparse_mla", "batch_invariant", None),
    *((op, "rope_dim", value) for op in ROW_OPS for value in (0, 7, HEAD_DIM, -2, True, 8.0)),
    *((op, name, value) for op, name in BLOCK_ROWS for value in (0, -1, 1 << 31, None)),
    ("compressed_row_read", "head_dim", 0),
    ("compressed_row_read", "head_dim", (1 << 24) + 2),
    ("kv_compress", "eps", -1e-6),
    ("kv_compress", "eps", float("nan")),
    ("kv_compress", "eps", float("inf")),
    ("kv_compress", "ratio", 0),
    ("kv_compress", "ratio", (1 << 20) + 1),
    ("kv_compress", "overlap", 0),
    ("kv_compress", "overlap", 3),
    ("kv_compress", "entry_kind", "key"),
    ("kv_compress", "entry_kind", None),
    ("kv_compress", "scale_format", "e8m0"),
    ("compressed_mla", "softmax_scale", float("nan")),
    ("compressed_mla", "softmax_scale", "0.1"),
    ("compressed_mla", "batch_invariant", 1),
    *((op, "block_size", value) for op in ("indexer_logits", "index_select") for value in (0, -1, 7, True, "8", 8.0)),
    ("index_query_quant", "cache_format", ["fp8"]),
    ("index_query_quant", "cache_format", None),
    ("mla_cache_write", "scale_format", {"plain"}),
    ("index_key_write", "scale_format", 1),
    # Paddle names no attribute and cuts an int that does not fit.
    ("index_select", "max_length", 1 << 64),
    ("indexer_logits", "logits_width", 7.0),
    ("topk_slots", "topk", True),
    ("topk_slots", "block_size", "8"),
    ("sparse_mla", "kv_lora_rank", None),
]


def fp8_index(block_size: int, index_head_dim: int) -> Arguments:
    return {
        "query": tensor(T, HEADS, index_head_dim, dtype="uint8"),
        "index_cache": tensor(BLOCKS, block_size, index_head_dim + 4, dtype="uint8"),
    }


def padded_index() -> Arguments:
    """fp8 keys in blocks of 8 * (16 + 4) bytes, filled up."""
    return {
        "query": tensor(T, HEADS, INDEX_DIM, dtype="uint8"),
        "index_cache": tensor(BLOCKS, 176, dtype="uint8"),
        "block_size": 8,
    }


# op, arguments that replace fitting ones, what the message says
MISFITS: list[tuple[str, Callable[[], Arguments], str]] = [
    *(
        (op, changes, words)
        for op, limit in (("indexer_logits", "logits_width"), ("index_select", "max_length"))
        for changes, words in (
            (lambda: {"lengths": ints(7, 8, 9)}, rf"lengths: expected at most 7 \({limit}\), got 8 in row 1"),
            (
                lambda limit=limit: {limit: 100, "lengths": ints(24, 0, 25)},
                r"lengths: expected at most 24 \(3 blocks a row of block_table, of 8 slots\), got 25 in row 2",
            ),
            (lambda limit=limit: {limit: 6}, rf"lengths: expected at most 6 \({limit}\), got 7 in row 0"),
            (lambda: {"request_ids": ints(0, 1, 2)}, "request_ids: .* at least 0 and below 2, got 2 in row 2"),
            (lambda: {"request_ids": ints(0, -1, 2)}, "request_ids: .* at least 0 and below 2, got -1 in row 1"),
            (
                lambda: {"index_cache": tensor(BLOCKS, 0, INDEX_DIM)},
                "index_cache: expected block_size of 1 to .* got 0",
            ),
            (
                lambda: fp8_index(6, INDEX_DIM),
                "index_cache: expected block_size to be a multiple of 4 in an fp8 .*got 6",
            ),
            (
                lambda: fp8_index(8, 129),
                "index_cache: expected index_head_dim of at most 128 in an fp8 cache.*got 129",
            ),
            (lambda: {"query": tensor(T, HEADS, 0)}, "query: expected index_head_dim of 1 to .* got 0 in"),
            (
                lambda: {"query": tensor(T, 0, INDEX_DIM), "folded_weights": tensor(T, 0)},
                "query: expected index_n_heads of 1 to .* got 0 in",
            ),
        )
    ),
    ("topk_slots", lambda: {"lengths": ints(7, 7, 8)}, r"lengths: .* 7 \(the width of logits\), got 8 in row 2"),
    ("topk_slots", lambda: {"request_ids": ints(5, 0, 0)}, "request_ids: .* below 2, got 5 in row 0"),
    ("topk_slots", lambda: {"num_blocks": 1 << 28}, "num_blocks: expected 0 to 268435455 blocks of block_size 8"),
    ("sparse_mla", lambda: {"counts": ints(0, TOPK + 1, 0)}, r"counts: expected 0 to 5 \(topk\), got 6 in row 1"),
    ("sparse_mla", lambda: {"counts": ints(0, 0, -1)}, r"counts: expected 0 to 5 \(topk\), got -1 in row 2"),
    ("sparse_mla", lambda: {"slot_ids": tensor(T, 0, dtype="int32")}, "slot_ids: expected topk of 1 to .*got 0 in"),
    (
        "sparse_mla",
        lambda: {"latent_cache": tensor(BLOCKS, 1, 0, LORA + ROPE)},
        "latent_cache: expected block_size of 1 to .* got 0 in",
    ),
    ("sparse_mla", lambda: {"query": tensor(T, 0, LORA + ROPE)}, "query: expected num_heads of 1 to .*got 0 in"),
    (
        "block_copy",
        lambda: {"src_block_ids": paddle.to_tensor([0, -1])},
        "src_block_ids: expected a block of src, at least 0 and below 4, got -1 in row 1",
    ),
    (
        "block_copy",
        lambda: {"dst_block_ids": paddle.to_tensor([BLOCKS, 0])},
        "dst_block_ids: expected a block of dst, at least 0 and below 4, got 4 in row 0",
    ),
    *(
        ("compressed_mla", changes, words)
        for changes, words in (
            (lambda: {"window_counts": ints(0, TOPK + 1, 0)}, r"window_counts: expected 0 to 5 .*got 6 in row 1"),
            (lambda: {"entry_counts": ints(0, 0, -1)}, r"entry_counts: expected 0 to 2 .*got -1 in row 2"),
            (lambda: {"entry_slots": None}, "entry_slots: expected a paddle.Tensor, or None for all of .*got None"),
            (
                lambda: {"entry_cache": None, "entry_counts": None},
                "entry_cache: expected a paddle.Tensor, or None for all of .*got None",
            ),
            (
                lambda: {"entry_cache": tensor(BLOCKS, 2, HEAD_DIM, dtype="bfloat16")},
                "entry_cache: expected float32 like window_cache, got bfloat16",
            ),
            (
                lambda: {"entry_cache": tensor(BLOCKS, 100, dtype="uint8")},
                "entry_cache: expected float32 like window_cache, got uint8",
            ),
            (
                lambda: {"window_cache": tensor(BLOCKS, 319, dtype="uint8")},
                r"window_cache: expected blocks of at least 320 bytes, a multiple of 2, .*got uint8 \[4, 319\]",
            ),
            (
                lambda: {"window_slots": tensor(T, 0, dtype="int32"), "entry_slots": tensor(T, 0, dtype="int32")},
                "window_slots: expected at least one column",
            ),
            (lambda: {"query": tensor(T, 0, HEAD_DIM)}, "query: expected num_heads of 1 to .*got 0 in"),
        )
    ),
    *(
        ("kv_compress", changes, words)
        for changes, words in (
            (lambda: {"positions": ints(1, -1, 3)}, "positions: expected at least 0, got -1 in row 1"),
            (lambda: {"request_ids": ints(0, 0, 2)}, "request_ids: .* at least 0 and below 2, got 2 in row 2"),
            (
                lambda: {"state_table": tensor(REQUESTS, 0, dtype="int32")},
                "state_table: expected state_table_width of 1 to .*got 0 in",
            ),
            (
                lambda: {"state_cache": tensor(BLOCKS, 0, 4 * HEAD_DIM)},
                "state_cache: expected state_block_tokens of 1 to .*got 0 in",
            ),
            (
                lambda: {"entry_cache": tensor(BLOCKS, 318, dtype="uint8")},
                "entry_cache: expected blocks of at least 320 bytes",
            ),
            (
                lambda: {"entry_kind": "index_key", "entry_cache": tensor(BLOCKS, 226, dtype="uint8")},
                "entry_cache: expected blocks of 224 bytes, filled up to a multiple of 4, for block_size 8",
            ),
            (
                lambda: {"entry_kind": "index_key", "entry_cache": tensor(BLOCKS, 220, dtype="uint8")},
                "entry_cache: expected blocks of 224 bytes, filled up",
            ),
            (
                lambda: {"entry_kind": "index_key", "entry_cache": tensor(BLOCKS, 4, HEAD_DIM)},
                "block_size: expected 4 as in entry_cache",
            ),
        )
    ),
    (
        "compressed_row_write",
        lambda: {"cache": tensor(BLOCKS, 319, dtype="uint8")},
        "cache: expected blocks of at least 320 bytes, a multiple of 2, for 8 rows of 24 numbers",
    ),
    (
        "compressed_row_write",
        lambda: {"rows": tensor(T, 25), "cache": tensor(BLOCKS, 1000, dtype="uint8")},
        "cache: expected rows of an even head_dim in an fp8 cache",
    ),
    ("inverse_rope", lambda: {"x": tensor(T, 0, HEAD_DIM)}, "x: expected num_heads of 1 to .*got 0 in"),
    (
        "inverse_rope",
        lambda: {"cos": tensor(T, 13), "sin": tensor(T, 13)},
        "cos: expected half_rope_dim of 1 to 12, got 13 in",
    ),
    *(
        (op, lambda changes=changes: {**padded_index(), **changes}, words)
        for op in ("indexer_logits", "index_select")
        for changes, words in (
            (
                {"block_size": None},
                r"index_cache: expected .* \[num_blocks, block_size, index_row\], got uint8 \[4, 176\]",
            ),
            ({"block_size": 12}, "index_cache: expected blocks of 240 bytes, filled up to a multiple of 4,"),
            ({"block_size": 6}, "index_cache: expected block_size to be a multiple of 4 in an fp8"),
        )
    ),
    ("mla_cache_write", lambda: {"cache": tensor(BLOCKS, 1, 0, LORA + ROPE)}, "cache: expected block_size of 1 to"),
    ("index_key_write", lambda: {"cache": tensor(BLOCKS, 0, INDEX_DIM)}, "cache: expected block_size of 1 to"),
    (
        "index_key_write",
        lambda: {"cache": tensor(BLOCKS, 7, INDEX_DIM + 4, dtype="uint8")},
        "cache: expected block_size to be a multiple of 4 in an fp8 cache, .*got 7",
    ),
    (
        "index_query_quant",
        lambda: {"query": tensor(0, 1 << 20, 1 << 20), "weights": tensor(0, 1 << 20)},
        r"query: expected index_n_heads \* index_head_dim of at most 1073741824, got 1048576 \* 1048576",
    ),
]


def call(op: str, arguments: Arguments) -> Any:
    return getattr(ops, op)(**arguments)


def outputs(op: str, arguments: Arguments) -> list[np.ndarray]:
    """Everything that a call produces, as arrays."""
    result = call(op, arguments)
    tensors = [] if result is None else [result] if isinstance(result, paddle.Tensor) else list(result)
    return [x.numpy() for x in (*tensors, *(arguments[name] for name in IN_PLACE.get(op, ())))]


def strided_copy(x: paddle.Tensor) -> paddle.Tensor:
    """The same numbers, with other memory between them along the last axis."""
    wide = paddle.concat([x, x], axis=-1)
    view = wide[..., : x.shape[-1]]
    return view if not view.is_contiguous() else paddle.stack([x, x], axis=-1)[..., 0]


def grown(x: paddle.Tensor, axis: int) -> paddle.Tensor:
    shape = list(x.shape)
    shape[axis] += 1
    return paddle.zeros(shape, dtype=x.dtype)


@pytest.mark.parametrize("op", FITTING)
def test_fitting_arguments_are_taken(op: str) -> None:
    call(op, FITTING[op]())


@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if pair not in ARENAS])
def test_a_wrong_dtype_is_refused(op: str, name: str) -> None:
    arguments = FITTING[op]()
    arguments[name] = arguments[name].cast("int16")
    with pytest.raises(ValueError, match=rf"\b{name}: expected .*got int16 \["):
        call(op, arguments)


@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if pair not in ARENAS])
def test_a_wrong_rank_is_refused(op: str, name: str) -> None:
    arguments = FITTING[op]()
    arguments[name] = arguments[name].unsqueeze(0)
    with pytest.raises(ValueError, match=rf"\b{name}: expected .*got \w+ \[1, "):
        call(op, arguments)


@pytest.mark.parametrize("name", ["src", "dst"])
@pytest.mark.parametrize("change", [lambda x: x.cast("int32"), lambda x: x.unsqueeze(1)], ids=["dtype", "rank"])
def test_arenas_that_disagree_are_refused(name: str, change: Callable[[paddle.Tensor], paddle.Tensor]) -> None:
    arguments = FITTING["block_copy"]()
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=r"\bdst: expected blocks like those of src"):
        call("block_copy", arguments)


@pytest.mark.parametrize(("op", "name", "axis"), [axis for axis in AXES if axis not in FREE_AXES])
def test_a_size_that_disagrees_is_refused(op: str, name: str, axis: int) -> None:
    arguments = FITTING[op]()
    arguments[name] = grown(arguments[name], axis)
    # The one that came first fixes the size, so that the message may blame another and name this one as its source.
    blamed = rf"\b{name}: expected|\(from {name}\)|cache: expected (rows|blocks) of|like those of {name}"
    with pytest.raises(ValueError, match=blamed):
        call(op, arguments)


@pytest.mark.parametrize(("op", "name", "axis"), sorted(FREE_AXES))
def test_a_size_that_stands_alone_is_free(op: str, name: str, axis: int) -> None:
    arguments = FITTING[op]()
    arguments[name] = grown(arguments[name], axis)
    call(op, arguments)


@pytest.mark.parametrize(("op", "name", "value"), NUMBERS)
def test_a_number_or_name_out_of_range_is_refused(op: str, name: str, value: object) -> None:
    arguments = {**FITTING[op](), name: value}
    with pytest.raises(ValueError, match=rf"\b{name}: expected"):
        call(op, arguments)


@pytest.mark.parametrize(("op", "changes", "words"), MISFITS)
def test_the_first_value_that_does_not_fit_is_named(op: str, changes: Callable[[], Arguments], words: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{words}"):
        call(op, FITTING[op]() | changes())


@pytest.mark.parametrize(("op", "name"), TENSORS)
@pytest.mark.parametrize(
    ("value", "kind"),
    [(np.zeros((2, 2), np.float32), "numpy.ndarray"), ([1, 2], "list"), (None, "NoneType"), (3, "int")],
    ids=["numpy", "list", "none", "int"],
)
def test_what_is_no_tensor_is_refused(op: str, name: str, value: object, kind: str) -> None:
    if value is None and (op, name) in OPTIONAL:
        kind = "None"  # and the others stay
    with pytest.raises(ValueError, match=rf"^{name}: expected a paddle.Tensor,.* got {kind}$"):
        call(op, {**FITTING[op](), name: value})


@pytest.mark.parametrize("scale", [1, np.float32(0.5), np.float64(0.5), -0.5, 3.4028234e38])
def test_a_softmax_scale_of_any_real_type_is_taken(scale: float) -> None:
    call("sparse_mla", {**FITTING["sparse_mla"](), "softmax_scale": scale})


TARGETS = [(op, name) for op, names in IN_PLACE.items() for name in names]


@pytest.mark.parametrize(("op", "name"), [*TARGETS, ("block_copy", "src")])
def test_an_arena_that_is_not_contiguous_is_refused_and_nothing_is_written(op: str, name: str) -> None:
    arguments = FITTING[op]()
    x = arguments[name]
    whole = paddle.concat([x, x], axis=-1)
    before = whole.numpy()
    arguments[name] = whole[..., : x.shape[-1]]
    targets = [arguments[target] for target in IN_PLACE[op]]
    targets_before = [target.numpy() for target in targets]
    with pytest.raises(ValueError, match=rf"\b{name}: expected a contiguous tensor"):
        call(op, arguments)
    np.testing.assert_array_equal(whole.numpy(), before)
    for target, target_before in zip(targets, targets_before, strict=True):
        np.testing.assert_array_equal(target.numpy(), target_before)


@pytest.mark.parametrize(("op", "name"), TARGETS)
def test_a_contiguous_part_of_a_cache_is_written_through(op: str, name: str) -> None:
    arguments = FITTING[op]()
    size = len(arguments[name])
    whole = paddle.concat([arguments[name]] * 2, axis=0)
    before = whole.numpy()
    arguments[name] = whole[size:]
    call(op, arguments)
    written = whole.numpy()
    np.testing.assert_array_equal(written[:size], before[:size])
    assert (written[size:] != before[size:]).any()


@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if pair not in {*TARGETS, ("block_copy", "src")}])
def test_an_input_that_is_not_contiguous_gives_the_same_result(op: str, name: str) -> None:
    paddle.seed(1)
    contiguous = FITTING[op]()
    paddle.seed(1)
    strided = FITTING[op]()
    strided[name] = strided_copy(strided[name])
    assert not strided[name].is_contiguous()
    for got, expected in zip(outputs(op, strided), outputs(op, contiguous), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("op", FITTING)
def test_an_empty_batch_is_valid(op: str) -> None:
    arguments = FITTING[op]()
    per_row = {name for name, x in arguments.items() if hasattr(x, "shape") and x.shape[0] == T}
    rows = {"src_block_ids", "dst_block_ids"} if op == "block_copy" else per_row
    for name in rows:
        arguments[name] = arguments[name][:0]
    results = outputs(op, arguments)
    num_targets = len(IN_PLACE.get(op, ()))
    made, changed = results[: len(results) - num_targets], results[len(results) - num_targets :]
    assert [x.shape[0] for x in made] == [0] * len(made)
    assert not any(x.any() for x in changed)


@pytest.mark.parametrize("op", FITTING)
def test_a_tensor_that_wants_gradients_is_taken(op: str) -> None:
    arguments = FITTING[op]()
    name = next(name for name in arguments if name not in IN_PLACE.get(op, ()))
    arguments[name].stop_gradient = False
    with paddle.no_grad():
        call(op, arguments)


def test_block_copy_inside_one_arena_moves_blocks() -> None:
    arena = paddle.arange(BLOCKS * 2).reshape([BLOCKS, 2])
    ids = paddle.to_tensor
    ops.block_copy(src=arena, dst=arena, src_block_ids=ids([0, 1]), dst_block_ids=ids([3, 2]))
    assert arena.tolist() == [[0, 1], [2, 3], [2, 3], [0, 1]]


def test_block_copy_with_an_id_outside_its_arena_copies_nothing() -> None:
    arguments = FITTING["block_copy"]()
    arguments["dst_block_ids"] = paddle.to_tensor([2, BLOCKS])
    with pytest.raises(ValueError, match="dst_block_ids: expected"):
        ops.block_copy(**arguments)
    assert not arguments["dst"].numpy().any()


def test_an_instruction_set_that_this_processor_lacks_is_refused() -> None:
    arguments = FITTING["index_query_quant"]()
    beyond = max(ISA_CODES.values()) + 1
    with pytest.raises(ValueError, match="index_query_quant: not supported on this device"):
        run_op("dsa_index_query_quant", arguments["query"], arguments["weights"], 2, 0, beyond)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(
            ({"num_threads": value}, f"num_threads: expected an int from 0 to 1024, got {value!r}")
            for value in (-1, 1025, 1 << 31, (1 << 32) + 1, 2.0, True, "2", None)
        ),
        ({"isa": "sse2"}, "isa: expected one of auto"),
        ({"isa": ["avx2"]}, r"isa: expected one of auto, .*got \['avx2'\]"),
        ({"isa": None}, "isa: expected one of auto, .*got None"),
    ],
)
def test_cpu_options_are_checked_once_when_they_are_made(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CpuOptions(**options)


@pytest.mark.parametrize("op", FITTING)
def test_options_of_another_type_are_refused(op: str) -> None:
    with pytest.raises(ValueError, match="cpu: expected CpuOptions, got int"):
        call(op, {**FITTING[op](), "cpu": 2})


@given(
    latent=st.tuples(st.integers(0, 3), st.integers(1, 3)),
    rope=st.tuples(st.integers(0, 3), st.integers(1, 3)),
    row=st.integers(1, 6),
    num_slots=st.integers(0, 3),
)
def test_mla_cache_write_takes_exactly_the_shapes_that_agree(
    latent: tuple[int, int], rope: tuple[int, int], row: int, num_slots: int
) -> None:
    arguments = {
        "latent": tensor(*latent),
        "rope": tensor(*rope),
        "cache": tensor(2, 1, 4, row),
        "slot_mapping": paddle.arange(num_slots),
    }
    if latent[0] == rope[0] == num_slots and latent[1] + rope[1] == row:
        ops.mla_cache_write(**arguments)
    else:
        with pytest.raises(ValueError, match=r"\b(rope|cache|slot_mapping): expected"):
            ops.mla_cache_write(**arguments)


@pytest.mark.parametrize(
    ("prefix", "codes"),
    [
        ("DSA_", CACHE_FORMAT_CODES),
        ("DSA_SCALE_", SCALE_FORMAT_CODES),
        ("DSA_ISA_", ISA_CODES),
        ("DSA_ENTRY_", ENTRY_KIND_CODES),
    ],
)
def test_codes_are_those_of_the_header(prefix: str, codes: dict[str, int]) -> None:
    constants = Headers().constants
    assert {name: constants[prefix + name.upper()] for name in codes} == dict(codes)


def test_the_bound_of_threads_is_that_of_the_header() -> None:
    assert Headers().constants["DSA_MAX_THREADS"] == MAX_THREADS


def test_every_op_has_a_function_of_its_name() -> None:
    assert set(FITTING) == set(ops.library.OPS)
    assert all(callable(getattr(ops, op)) for op in ops.library.OPS)
