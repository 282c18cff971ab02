"""Prefill on a GPU: rows that many query rows use are widened once for all, and no bit shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kit.c_api import CApi
from tests.kit.cases import SparseMlaCase
from tests.kit.checks import check_attention
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation
from tests.ops.test_c_abi import host_params

FEW = 200
"""Query rows of a call that is too small for widening, and large enough for the same order of sums."""


def prefill(**changes: Any) -> SparseMlaCase:
    """Enough query rows for widening; counts with empty and full rows, odd and even numbers of tiles."""
    num_tokens, topk = changes.setdefault("num_tokens", 520), changes.setdefault("topk", 300)
    counts = np.random.default_rng(5).integers(0, topk + 1, num_tokens)
    counts[:4] = (0, topk, 1, min(topk, 64))
    changes.setdefault("counts", tuple(int(count) for count in counts))
    return SparseMlaCase(query_format="bfloat16", **changes)


CASES = {
    "64 heads": prefill(num_heads=64),
    "128 heads, all ids count": prefill(num_heads=128, counts=None),
    "a part of 64 heads": prefill(num_heads=100),
    "scales that are no powers of two": prefill(num_heads=64, scale_format="plain"),
    "blocks of another size, with gaps": prefill(num_heads=64, block_size=48, gap_bytes=32),
    "blocks of one slot": prefill(num_heads=64, block_size=1),
    "one tile a row": prefill(num_heads=64, topk=40),
    "one row dominates": prefill(num_heads=64, logit_size=30.0),
    "more ids a row than are looked at together": prefill(num_heads=33, topk=2300),
    "more blocks than it pays to widen": prefill(num_heads=64, topk=16, num_slots=8192),
}


def in_small_calls(implementation: Implementation, arguments: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """The results of calls that widen nothing, side by side."""
    results = []
    for first in range(0, len(arguments["query"]), FEW):
        rows = slice(first, first + FEW)
        part = {name: arguments[name][rows] for name in ("query", "slot_ids")}
        counts = arguments["counts"]
        part["counts"] = None if counts is None else counts[rows]
        results.append(implementation.sparse_mla(**arguments | part))
    return [np.concatenate(arrays) for arrays in zip(*results, strict=True)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_widened_for_all_give_the_bits_of_rows_widened_while_they_are_gathered(
    gpu_implementation: Implementation, case: SparseMlaCase
) -> None:
    arguments = case.arguments()
    small = in_small_calls(gpu_implementation, arguments)
    whole = gpu_implementation.sparse_mla(**arguments)
    for actual, expected, name in zip(whole, small, ("out", "lse"), strict=True):
        assert_same(actual, expected, name)


@pytest.mark.parametrize(
    ("changes", "widens"),
    [
        ({}, True),
        ({"num_tokens": 511}, False),
        ({"num_heads": 32}, False),
        ({"batch_invariant": 1}, False),
        ({"topk": 64, "block_size": 1 << 20, "num_blocks": 8}, False),
        ({"num_blocks": 1 << 25, "block_size": 1}, False),
        ({"num_blocks": 0}, False),
    ],
    ids=str,
)
def test_room_to_widen_is_asked_for_where_it_is_used(
    c_gpu_implementation: CApi, changes: dict[str, Any], widens: bool
) -> None:
    """Without this, the tests above would compare a kernel with itself."""
    large = {"num_tokens": 512, "num_heads": 64, "topk": 2048, "num_blocks": 1000, "block_size": 64, "counts": None}
    formats = {name: c_gpu_implementation.constant("DSA", name) for name in ("fp8", "bfloat16")}
    row_bytes = 656
    fields: dict[str, Any] = large | {"cache_format": formats["fp8"], "query_format": formats["bfloat16"]} | changes
    fields |= {"block_stride_bytes": fields["block_size"] * row_bytes}
    params = host_params(c_gpu_implementation, "sparse_mla", **fields, kv_lora_rank=512, qk_rope_head_dim=64)
    for array in ("query", "out", "latent_cache"):
        setattr(params, array, 4096)  # aligned; nobody reads it
    widened_bytes = 512 * 64 // 4 * 1152  # less than any call with room may ask for
    assert (c_gpu_implementation.workspace_bytes("sparse_mla", params) > widened_bytes) == widens


def test_rows_widened_for_all_give_the_attention_of_the_definition(gpu_implementation: Implementation) -> None:
    arguments = prefill(num_heads=40, topk=130).arguments()
    check_attention(arguments, *gpu_implementation.sparse_mla(**arguments), rounds_weights=True)


def test_rows_widened_for_all_may_repeat_and_lie_outside_the_cache(gpu_implementation: Implementation) -> None:
    arguments = prefill(num_heads=64, counts=None, invalid_every=2).arguments()
    arguments["slot_ids"][:100] = arguments["slot_ids"][0, 0]
    arguments["slot_ids"][100:200] = -1
    small = in_small_calls(gpu_implementation, arguments)
    whole = gpu_implementation.sparse_mla(**arguments)
    for actual, expected, name in zip(whole, small, ("out", "lse"), strict=True):
        assert_same(actual, expected, name)
    assert not whole[0][100:200].any()
    assert np.all(np.isneginf(whole[1][100:200]))
