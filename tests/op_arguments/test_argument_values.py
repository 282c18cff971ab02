"""Every op refuses numbers, names and values inside tensors that do not fit, naming the first that does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest

from fastdeploy_dsa import ops
from tests.kit.op_arguments import (
    BLOCKS,
    FITTING,
    HEAD_DIM,
    HEADS,
    INDEX_DIM,
    LORA,
    REQUESTS,
    ROPE,
    TOPK,
    Arguments,
    T,
    call,
    ints,
    tensor,
)

pytestmark = pytest.mark.usefixtures("tensors_on_the_cpu")

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


@pytest.mark.parametrize(("op", "name", "value"), NUMBERS)
def test_a_number_or_name_out_of_range_is_refused(op: str, name: str, value: object) -> None:
    arguments = {**FITTING[op](), name: value}
    with pytest.raises(ValueError, match=rf"\b{name}: expected"):
        call(op, arguments)


@pytest.mark.parametrize(("op", "changes", "words"), MISFITS)
def test_the_first_value_that_does_not_fit_is_named(op: str, changes: Callable[[], Arguments], words: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{words}"):
        call(op, FITTING[op]() | changes())


@pytest.mark.parametrize("scale", [1, np.float32(0.5), np.float64(0.5), -0.5, 3.4028234e38])
def test_a_softmax_scale_of_any_real_type_is_taken(scale: float) -> None:
    call("sparse_mla", {**FITTING["sparse_mla"](), "softmax_scale": scale})


def test_block_copy_with_an_id_outside_its_arena_copies_nothing() -> None:
    arguments = FITTING["block_copy"]()
    arguments["dst_block_ids"] = paddle.to_tensor([2, BLOCKS])
    with pytest.raises(ValueError, match="dst_block_ids: expected"):
        ops.block_copy(**arguments)
    assert not arguments["dst"].numpy().any()
