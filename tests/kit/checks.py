"""One check per op: build the arguments, run the implementation, then the reference, then compare.

The implementation runs first, so that it cannot find the answers in recycled memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from fastdeploy_dsa.ops.reference import IndexSelection
from tests.kit.cases import (
    BlockCopyCase,
    IndexerCase,
    IndexKeyWriteCase,
    IndexQueryQuantCase,
    LayerWriteCase,
    MlaCacheWriteCase,
    SparseMlaCase,
    TopkCase,
)
from tests.kit.compare import LOOSEST_BOUND, assert_close, assert_same, assert_selects_best, relative_square_error
from tests.kit.implementation import Implementation
from tests.kit.poison import whole_memory
from tests.kit.tolerances import indexer_logits_bound, sparse_mla_bound

LOGITS_SQUARE_ERROR = 5e-6  # rule S74, on the same quantised inputs
OUT_SQUARE_ERROR = 1e-5  # rule S74
LOOSEST_BFLOAT16 = 2.0**-5  # share of out that weights and outputs of bfloat16 may leave uncertain


def check_mla_cache_write(implementation: Implementation, case: MlaCacheWriteCase) -> None:
    """Every byte of the cache, its gaps and its guards."""
    actual, expected = case.arguments(), case.arguments()
    implementation.mla_cache_write(**actual)
    reference.mla_cache_write(**expected)
    assert_same_memory(actual["cache"], expected["cache"], "cache")


def check_index_key_write(implementation: Implementation, case: IndexKeyWriteCase) -> None:
    """Every byte of the cache, its gaps and its guards."""
    actual, expected = case.arguments(), case.arguments()
    implementation.index_key_write(**actual)
    reference.index_key_write(**expected)
    assert_same_memory(actual["cache"], expected["cache"], "cache")


def check_index_query_quant(implementation: Implementation, case: IndexQueryQuantCase) -> None:
    """Every bit of both outputs."""
    arguments = case.arguments()
    quantized, folded_weights = implementation.index_query_quant(**arguments)
    expected_quantized, expected_weights = reference.index_query_quant(**arguments)
    assert_same(quantized, expected_quantized, "quantized")
    assert_same(folded_weights, expected_weights, "folded_weights")


def check_layer_write(implementation: Implementation, case: LayerWriteCase) -> None:
    """Bit for bit the three ops, of the same implementation and of the reference, with gaps and guards."""
    actual, expected = case.arguments(), case.arguments()
    outputs = implementation.layer_write(**actual)
    latent, key, query = case.parts()
    implementation.mla_cache_write(**latent)
    implementation.index_key_write(**key)
    composed = implementation.index_query_quant(**query)
    exact = reference.layer_write(**expected)
    for i, name in enumerate(("quantized", "folded_weights")):
        assert_same(outputs[i], composed[i], f"{name} of the three ops")
        assert_same(outputs[i], exact[i], name)
    for name, part in (("latent_cache", latent), ("index_cache", key)):
        assert_same_memory(actual[name], part["cache"], f"{name} of the three ops")
        assert_same_memory(actual[name], expected[name], name)


def check_indexer_logits(implementation: Implementation, case: IndexerCase) -> NDArray[Any]:
    """Scores within their derived bound; unwritten columns untouched. Returns the implementation's scores."""
    arguments = case.arguments()
    logits = implementation.indexer_logits(**arguments)
    check_logits(implementation, arguments, logits)
    return logits


def check_logits(implementation: Implementation, arguments: dict[str, Any], logits: NDArray[Any]) -> None:
    """As check_indexer_logits, for scores that exist already."""
    expected = reference.indexer_logits(**arguments)
    visible = np.arange(expected.shape[1]) < arguments["lengths"][:, None]
    if implementation.shows_unwritten:
        untouched = np.full(logits.shape, -1, np.int32).view(np.float32)
        assert_same(logits, untouched, "columns behind the length", mask=~visible)
    actual = np.where(visible, logits, np.nan)
    bound = indexer_logits_bound(arguments, truncates_sums=implementation.truncates_sums(arguments))
    assert_close(actual, expected, bound, "logits")
    assert not relative_square_error(actual, expected) > LOGITS_SQUARE_ERROR


def check_topk_slots(implementation: Implementation, case: TopkCase) -> None:
    """Every id, on the same scores."""
    arguments = case.arguments()
    selection = implementation.topk_slots(**arguments)
    assert_same_selection(selection, reference.topk_slots(**arguments))


def check_index_select(
    implementation: Implementation, case: IndexerCase, *, topk: int, max_logits_bytes: int = 512 << 20
) -> IndexSelection:
    """Bit for bit the two ops it is made of, and as good as float32 scores can tell. Returns the selection."""
    arguments = case.selection_arguments(topk=topk, max_logits_bytes=max_logits_bytes)
    selection = implementation.index_select(**arguments)
    scoring = case.arguments()
    cache = scoring["index_cache"]
    paging = {name: scoring[name] for name in ("lengths", "block_table", "request_ids")}
    composed = implementation.topk_slots(
        logits=implementation.indexer_logits(**scoring),
        topk=topk,
        num_blocks=cache.shape[0],
        block_size=cache.shape[1],
        **paging,
    )
    assert_same_selection(selection, composed)
    exact = reference.indexer_logits(**scoring)
    bound = indexer_logits_bound(scoring, truncates_sums=implementation.truncates_sums(scoring))
    for row, length in enumerate(case.lengths):
        assert_selects_best(selection.positions[row], exact[row], bound[row], length, f"positions[{row}]")
    return selection


def check_sparse_mla(implementation: Implementation, case: SparseMlaCase) -> tuple[NDArray[Any], NDArray[Any]]:
    """out and lse within their derived bounds. Returns both as the implementation gave them."""
    arguments = case.arguments()
    out, lse = implementation.sparse_mla(**arguments)
    check_attention(arguments, out, lse, rounds_weights=implementation.rounds_weights(arguments))
    return out, lse


def check_attention(
    arguments: dict[str, Any], out: NDArray[Any], lse: NDArray[Any], *, rounds_weights: bool = False
) -> None:
    """As check_sparse_mla, for results that exist already."""
    assert out.dtype == arguments["query"].dtype
    assert lse.dtype == np.float32
    expected_out, expected_lse = reference.sparse_mla(**arguments)
    out_bound, lse_bound = sparse_mla_bound(arguments, expected_out, expected_lse, rounds_weights=rounds_weights)
    loosest = LOOSEST_BFLOAT16 if rounds_weights else LOOSEST_BOUND
    assert_close(reference.decode(out), expected_out, out_bound, "out", loosest=loosest)
    assert_close(lse, expected_lse, lse_bound, "lse")
    assert not relative_square_error(reference.decode(out), expected_out) > OUT_SQUARE_ERROR


def check_block_copy(implementation: Implementation, case: BlockCopyCase) -> None:
    """Every byte of both arenas, their gaps and their guards."""
    actual, expected = case.arguments(), case.arguments()
    implementation.block_copy(**actual)
    reference.block_copy(**expected)
    assert_same_memory(actual["dst"], expected["dst"], "dst")
    assert_same_memory(actual["src"], expected["src"], "src")


def assert_same_selection(actual: IndexSelection, expected: IndexSelection) -> None:
    """Positions, slots and counts, every id."""
    for name, array in actual._asdict().items():
        assert_same(array, getattr(expected, name), name)


def assert_same_memory(actual: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    assert_same(actual, expected, what)
    places = [(whole_memory(view), view.ctypes.data) for view in (actual, expected)]
    # The allocations may be aligned differently: compare what lies around the first block.
    (left, first), (right, second) = [(memory, data - memory.ctypes.data) for memory, data in places]
    before = min(first, second)
    after = min(left.size - first, right.size - second)
    assert_same(
        left[first - before : first + after], right[second - before : second + after], f"bytes of and around {what}"
    )
