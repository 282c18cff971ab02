"""Byte layouts: published sizes, and agreement of Python and C."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_dsa import cache_layout
from fastdeploy_dsa.cache_layout import index_layout, index_spec, latent_layout, latent_spec
from fastdeploy_dsa.ops import CacheFormat

FORMAT_CODES: dict[CacheFormat, int] = {"float32": 0, "bfloat16": 1, "fp8": 2}
formats = st.sampled_from(sorted(FORMAT_CODES))


@pytest.fixture(scope="module")
def c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(cache_layout.__file__).parent / "_lib" / "libfastdeploy_dsa.so"))
    for name in (
        "latent_scale_offset",
        "latent_rope_offset",
        "latent_row_bytes",
        "index_scale_offset",
        "index_block_bytes",
    ):
        getattr(library, f"dsa_{name}").restype = ctypes.c_int64
    return library


@pytest.mark.parametrize(
    ("cache_format", "latent", "index"), [("fp8", 656, 132), ("bfloat16", 1152, 256), ("float32", 2304, 512)]
)
def test_production_entries_have_the_published_sizes(cache_format: CacheFormat, latent: int, index: int) -> None:
    assert latent_layout(cache_format, 512, 64).token_bytes == latent
    assert index_layout(cache_format, 128).token_bytes == index


def test_fp8_latent_row_has_the_published_offsets() -> None:
    layout = latent_layout("fp8", 512, 64)
    assert [layout.field_offset(name) for name in ("latent", "scale", "rope")] == [0, 512, 528]


def test_fp8_index_block_stores_all_values_then_all_scales() -> None:
    layout, block_bytes = index_layout("fp8", 128), index_spec(index_layout("fp8", 128), (0,), 64).bytes_per_block
    assert layout.field_offset("scale", block_size=64) == 64 * 128
    assert block_bytes == 8448
    # rule check 7: block 3, offset 5, value 7 and scale
    assert 3 * block_bytes + 5 * 128 + 7 == 25991
    assert 3 * block_bytes + layout.field_offset("scale", block_size=64) + 4 * 5 == 33556


def test_declared_shapes_are_those_fastdeploy_expects() -> None:
    assert latent_spec(latent_layout("fp8", 512, 64), (0,), 64).block_shape == (1, 64, 656)
    assert index_spec(index_layout("fp8", 128), (0,), 64).block_shape == (64, 132)
    assert latent_spec(latent_layout("bfloat16", 512, 64), (0,), 64).block_shape == (1, 64, 576)


def test_layout_ids_spell_role_format_block_and_scales() -> None:
    assert index_spec(index_layout("fp8", 128), (0,), 64).layout_id == "indexer/fp8_132/bs64/ue8m0/had0"
    assert latent_spec(latent_layout("fp8", 512, 64), (0,), 64, "plain").layout_id == "key/fp8_ds_mla/bs64/plain/had0"


@given(formats, st.integers(1, 700), st.integers(1, 130))
def test_python_and_c_agree_on_latent_rows(
    c_library: ctypes.CDLL, cache_format: CacheFormat, rank: int, rope: int
) -> None:
    layout, code = latent_layout(cache_format, rank, rope), FORMAT_CODES[cache_format]
    assert c_library.dsa_latent_row_bytes(code, rank, rope) == layout.token_bytes
    assert c_library.dsa_latent_rope_offset(code, rank) == layout.field_offset("rope")
    if cache_format == "fp8":
        assert c_library.dsa_latent_scale_offset(code, rank) == layout.field_offset("scale")


@given(formats, st.integers(1, 128), st.integers(1, 40).map(lambda n: 4 * n))
def test_python_and_c_agree_on_index_blocks(
    c_library: ctypes.CDLL, cache_format: CacheFormat, head_dim: int, block_size: int
) -> None:
    layout, code = index_layout(cache_format, head_dim), FORMAT_CODES[cache_format]
    assert c_library.dsa_index_block_bytes(code, block_size, head_dim) == layout.token_bytes * block_size
    assert index_spec(layout, (0,), block_size).bytes_per_block == layout.token_bytes * block_size
    if cache_format == "fp8":
        assert c_library.dsa_index_scale_offset(code, block_size, head_dim) == layout.field_offset("scale", block_size)


def test_an_fp8_index_head_above_one_scale_group_is_refused() -> None:
    with pytest.raises(ValueError, match="index_head_dim: an fp8 index cache takes at most 128, got 192"):
        index_layout("fp8", 192)


def test_an_fp8_block_that_would_misalign_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size: an fp8 index cache needs a multiple of 4, got 6"):
        index_spec(index_layout("fp8", 128), (0,), 6)
