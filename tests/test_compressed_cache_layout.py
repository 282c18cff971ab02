"""Caches of compressed attention: published bytes, blocks and roles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_manager import ordered_keys
from fastdeploy_dsa.cache_layout import CacheSpan
from fastdeploy_dsa.compressed_cache_layout import CompressedSizes, compressed_spans, row_layout
from fastdeploy_dsa.ops import CacheFormat

# Layers 0 and 5 (draft) window, 1 and 3 ratio 128, 2 and 4 ratio 4; layer 4 shares the selection of layer 2.
SIZES = CompressedSizes(
    head_dim=512,
    qk_rope_head_dim=64,
    index_head_dim=128,
    sliding_window=128,
    ratios=((0, 1), (1, 128), (2, 4), (3, 128), (4, 4), (5, 1)),
    selecting_layers=(2,),
)
ALL_LAYERS = tuple(range(6))


def spans(cache_format: CacheFormat = "fp8", layer_ids: tuple[int, ...] = ALL_LAYERS) -> list[CacheSpan]:
    return list(compressed_spans(SIZES, cache_format=cache_format, layer_ids=layer_ids))


@pytest.mark.parametrize(("cache_format", "num_bytes"), [("fp8", 584), ("bfloat16", 1024), ("float32", 2048)])
def test_rows_have_the_published_sizes(cache_format: CacheFormat, num_bytes: int) -> None:
    assert row_layout(cache_format, 512, 64).token_bytes == num_bytes


def test_scales_lie_at_the_tail_of_a_block() -> None:
    layout = row_layout("fp8", 512, 64)
    assert layout.name == "fp8_584"
    assert [layout.field_offset(name, 64) for name in ("value", "rope", "scale")] == [0, 448, 64 * 576]
    # rule check 7: block of 64 rows, row 5; block of 2 rows, row 1
    assert (5 * 576, 5 * 576 + 448, layout.field_offset("scale", 64) + 5 * 8) == (2880, 3328, 36904)
    assert layout.field_offset("scale", 2) + 8 == 1160


def test_roles_in_layer_order() -> None:
    keys = ordered_keys(tuple(span.spec for span in spans()))
    assert keys == (
        ("swa", 0),
        *(("key", 1), ("swa", 1), ("comp_state", 1)),
        *(("key", 2), ("indexer", 2), ("swa", 2), ("comp_state", 2), ("idx_comp_state", 2)),
        *(("key", 3), ("swa", 3), ("comp_state", 3)),
        *(("key", 4), ("swa", 4), ("comp_state", 4)),
        ("swa", 5),
    )


@pytest.mark.parametrize(
    ("role", "layers", "block_shape", "block_tokens", "live_tokens", "layout_id"),
    [
        ("key", (2, 4), (37440,), 256, None, "key/fp8_584/n64/tail-scales"),
        ("key", (1, 3), (1728,), 256, None, "key/fp8_584/n2/tail-scales"),
        ("indexer", (2,), (8640,), 256, None, "indexer/fp8_132/n64/tail-scales"),
        ("swa", ALL_LAYERS, (37440,), 64, 128, "swa/fp8_584/n64/tail-scales"),
        ("comp_state", (2, 4), (4, 2048), 4, 8, "comp_state/float32/n4"),
        ("comp_state", (1, 3), (8, 1024), 8, 128, "comp_state/float32/n8"),
        ("idx_comp_state", (2,), (4, 512), 4, 8, "idx_comp_state/float32/n4"),
    ],
)
def test_a_tensor_is_declared(
    role: str,
    layers: tuple[int, ...],
    block_shape: tuple[int, ...],
    block_tokens: int,
    live_tokens: int | None,
    layout_id: str,
) -> None:
    (span,) = [span for span in spans() if span.spec.role == role and span.spec.layer_ids == layers]
    assert (span.spec.block_shape, span.spec.layout_id) == (block_shape, layout_id)
    assert (span.block_tokens, span.live_tokens) == (block_tokens, live_tokens)


@pytest.mark.parametrize(
    ("role", "width", "row_bytes"),
    [("comp_state", 2048, 8192), ("idx_comp_state", 512, 2048), ("comp_state", 1024, 4096)],
)
def test_state_rows_have_the_published_sizes(role: str, width: int, row_bytes: int) -> None:
    (span,) = [span for span in spans() if span.spec.role == role and span.spec.block_shape[1] == width]
    assert span.data_bytes // span.block_tokens == row_bytes


@pytest.mark.parametrize("cache_format", ["bfloat16", "float32"])
def test_plain_formats_have_rows_of_numbers_and_no_padding(cache_format: CacheFormat) -> None:
    shapes = {(span.spec.role, span.spec.block_shape) for span in spans(cache_format) if "state" not in span.spec.role}
    assert shapes == {("key", (64, 512)), ("key", (2, 512)), ("indexer", (64, 128)), ("swa", (64, 512))}
    assert all(span.data_bytes == span.spec.bytes_per_block for span in spans(cache_format))


def test_a_shared_layer_saves_its_index_entries_and_state() -> None:
    both = CompressedSizes(**{**SIZES.__dict__, "selecting_layers": (2, 4)})
    more = {span.spec.role: span for span in compressed_spans(both, cache_format="fp8", layer_ids=(4,))}
    assert {span.spec.role for span in spans(layer_ids=(4,))} == set(more) - {"indexer", "idx_comp_state"}
    assert more["indexer"].unpadded_bytes_per_token == 33
    assert more["idx_comp_state"].live_bytes == 8 * 2048


def test_layers_outside_the_request_are_left_out() -> None:
    assert {layer for span in spans(layer_ids=(0, 5)) for layer in span.spec.layer_ids} == {0, 5}
    assert spans(layer_ids=()) == []


@given(
    block_tokens=st.integers(1, 16),
    live_tokens=st.integers(1, 40),
    num_tokens=st.integers(0, 200),
    drop=st.integers(0, 5),
)
def test_a_window_never_needs_more_blocks_than_planned(
    block_tokens: int, live_tokens: int, num_tokens: int, drop: int
) -> None:
    span = CacheSpan(spans()[0].spec, block_tokens, 1, live_tokens)
    length = max(num_tokens - drop, 0)  # any length on the way
    held = {position // block_tokens for position in range(max(length - live_tokens, 0), length)}
    assert len(held) <= span.blocks(num_tokens)


@given(block_tokens=st.integers(1, 300), num_tokens=st.integers(0, 2000))
def test_entries_need_a_block_for_every_token(block_tokens: int, num_tokens: int) -> None:
    span = CacheSpan(spans()[0].spec, block_tokens, 1)
    assert span.blocks(num_tokens) == len({position // block_tokens for position in range(num_tokens)})
