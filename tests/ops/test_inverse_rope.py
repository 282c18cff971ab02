from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.ops import reference
from tests.kit.compare import assert_same
from tests.kit.compressed_cases import CompressedMlaCase, InverseRopeCase
from tests.kit.compressed_checks import check_inverse_rope
from tests.kit.implementation import Implementation

FORMATS: list[Any] = ["float32", "bfloat16"]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 7, 16, 64, 128])
@pytest.mark.parametrize("x_format", FORMATS)
def test_any_number_of_heads(implementation: Implementation, x_format: Any, num_heads: int) -> None:
    check_inverse_rope(implementation, InverseRopeCase(num_heads=num_heads, x_format=x_format))


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(96, 32), (2, 2), (5, 4), (66, 64), (513, 2), (64, 64)])
@pytest.mark.parametrize("x_format", FORMATS)
def test_other_dims(implementation: Implementation, x_format: Any, head_dim: int, rope_dim: int) -> None:
    check_inverse_rope(implementation, InverseRopeCase(head_dim=head_dim, rope_dim=rope_dim, x_format=x_format))


@pytest.mark.parametrize("num_tokens", [0, 1, 500])
def test_any_number_of_rows_on_any_number_of_threads(implementation: Implementation, num_tokens: int) -> None:
    case = InverseRopeCase(num_tokens=num_tokens, head_dim=72)
    arrays = []
    for num_threads in (1, 2, 4):
        check_inverse_rope(implementation.on_threads(num_threads), case)
        arguments = case.arguments()
        implementation.on_threads(num_threads).inverse_rope(**arguments)
        arrays.append(arguments["x"])
    assert_same(arrays[1], arrays[0], "x on 2 threads")
    assert_same(arrays[2], arrays[0], "x on 4 threads")


def test_v4_v04_it_undoes_the_rotation_at_the_position_of_the_query(implementation: Implementation) -> None:
    # Check 10: attention over one row at position p with the query at p, then this, gives the unrotated row.
    positions = np.array([0, 1, 777])
    angles = positions[:, None] * 1e4 ** -(np.arange(32) / 32)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    rows = np.random.default_rng(3).standard_normal((3, 512)).astype(np.float32)
    keys = rows.copy()
    keys[:, 448:] = reference.compressed.rotated(rows[:, 448:].astype(np.float64), cos, sin)
    arguments = CompressedMlaCase(
        window_width=1, entry_width=0, invalid_every=0, cache_format="float32", sinks="none"
    ).arguments()
    arguments["window_slots"] = np.arange(3, dtype=np.int32)[:, None]
    reference.compressed_row_write(
        rows=keys, cache=arguments["window_cache"], slot_mapping=np.arange(3), rope_dim=64, block_rows=64
    )
    out, _ = implementation.compressed_mla(**arguments)
    implementation.inverse_rope(x=out, cos=cos, sin=sin)
    assert np.abs(out - rows[:, None]).max() < 1e-6
