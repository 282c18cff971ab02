"""The bounds granted to a GPU hold for an emulation of what it does, and do not hold for one bit less."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from tests.kit.cases import IndexerCase, SparseMlaCase
from tests.kit.compare import assert_close
from tests.kit.tolerances import TENSOR_CORE_STEP, indexer_logits_bound, sparse_mla_bound

FRACTIONAL_BITS = 13


def truncated(addends: NDArray[np.float64], fractional_bits: int) -> NDArray[np.float64]:
    """Sums along the last axis of what is left of numbers aligned to the largest of them."""
    largest = np.abs(addends).max(-1, keepdims=True)
    unit = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1))) - fractional_bits)
    sums: NDArray[np.float64] = (np.trunc(addends / unit) * unit).sum(-1)
    return sums


def tensor_core_logits(arguments: dict[str, Any], fractional_bits: int) -> NDArray[np.float64]:
    """indexer_logits of an fp8 cache with truncated sums of every 32 products."""
    cache, query = arguments["index_cache"], reference.decode(arguments["query"]).astype(np.float64)
    logits = np.full((len(query), arguments["logits_width"]), np.nan)
    for t, length in enumerate(arguments["lengths"]):
        if length <= 0:
            continue
        blocks = arguments["block_table"][arguments["request_ids"][t]]
        slots = reference.indexer.position_slots(np.arange(length), blocks, cache)
        keys, scales = reference.read_index_keys(cache, slots)
        dots = np.zeros((query.shape[1], length))
        for first in range(0, query.shape[2], TENSOR_CORE_STEP):
            part = slice(first, first + TENSOR_CORE_STEP)
            products = query[t, :, None, part] * keys[None, :, part]
            dots = truncated(np.concatenate([products, dots[..., None]], -1), fractional_bits)
        logits[t, :length] = scales * (arguments["folded_weights"][t].astype(np.float64) @ np.maximum(dots, 0))
    return logits


@pytest.mark.parametrize(
    "case",
    [
        IndexerCase(),
        IndexerCase(index_n_heads=1),
        IndexerCase(index_n_heads=5, index_head_dim=40, block_size=12),
        IndexerCase(keys="close", index_n_heads=32),
        IndexerCase(keys="tied"),
    ],
    ids=str,
)
def test_scores_of_tensor_cores_lie_within_their_bound(case: IndexerCase) -> None:
    arguments = case.arguments()
    exact = reference.indexer_logits(**arguments)
    bound = indexer_logits_bound(arguments, truncates_sums=True)
    assert_close(tensor_core_logits(arguments, FRACTIONAL_BITS), exact, bound, "logits")


def test_scores_with_seven_fractional_bits_do_not() -> None:
    arguments = IndexerCase().arguments()
    exact = reference.indexer_logits(**arguments)
    bound = indexer_logits_bound(arguments, truncates_sums=True)
    with pytest.raises(AssertionError, match="logits"):
        assert_close(tensor_core_logits(arguments, 7), exact, bound, "logits")


def attention_with_rounded_weights(
    arguments: dict[str, Any], keep: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """out with weights of `keep` significant bits and their exact sum, and the exact out and lse."""
    out, lse = reference.sparse_mla(**arguments)
    rounded = np.zeros_like(out)
    cache, rank = arguments["latent_cache"], arguments["kv_lora_rank"]
    query = reference.decode(arguments["query"]).astype(np.float64)
    for t, ids in enumerate(arguments["slot_ids"]):
        seen = ids[(ids >= 0) & (ids < cache.shape[0] * cache.shape[2])]
        rows = reference.read_latent_rows(cache, seen, rank, query.shape[2] - rank).astype(np.float64)
        logits = float(np.float32(arguments["softmax_scale"])) * (query[t] @ rows.T)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mantissa, exponent = np.frexp(weights)
        kept = np.ldexp(np.round(np.ldexp(mantissa, keep)), exponent - keep)
        rounded[t] = kept / weights.sum(-1, keepdims=True) @ rows[:, :rank]
    return rounded, out, lse


@pytest.mark.parametrize("logit_size", [0.0, 1e-3, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("topk", [2, 100, 2048])
def test_attention_with_weights_of_bfloat16_lies_within_its_bound(topk: int, logit_size: float) -> None:
    arguments = SparseMlaCase(topk=topk, num_tokens=2, logit_size=logit_size, query_format="bfloat16").arguments()
    rounded, out, lse = attention_with_rounded_weights(arguments, keep=8)
    bound, _ = sparse_mla_bound(arguments, out, lse, rounds_weights=True)
    as_stored = reference.decode(reference.bf16_encode(rounded.astype(np.float32)))
    assert_close(as_stored, out, bound, "out", loosest=2.0**-5)


def test_attention_with_weights_of_four_bits_does_not() -> None:
    arguments = SparseMlaCase(topk=300, query_format="bfloat16").arguments()
    rounded, out, lse = attention_with_rounded_weights(arguments, keep=4)
    bound, _ = sparse_mla_bound(arguments, out, lse, rounds_weights=True)
    with pytest.raises(AssertionError, match="out"):
        assert_close(rounded, out, bound, "out", loosest=2.0**-5)
