from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastdeploy_dsa.ops.reference import IndexSelection
from tests.kit.cases import Scores, TopkCase
from tests.kit.checks import assert_same_selection, check_topk_slots
from tests.kit.implementation import Implementation

SCORES: list[Scores] = ["random", "plateau", "close", "special"]
# One example is drawn per call of the test, and the implementation is the same object for all of them.
SHARED_FIXTURE = [HealthCheck.function_scoped_fixture]


def select(implementation: Implementation, scores: NDArray[np.float32], topk: int) -> IndexSelection:
    """Select from one row with identity slots."""
    arguments: dict[str, Any] = {
        "logits": scores[None].astype(np.float32),
        "lengths": np.array([len(scores)], np.int32),
        "block_table": np.arange(len(scores) // 4 + 1, dtype=np.int32)[None],
        "request_ids": np.zeros(1, np.int32),
        "topk": topk,
        "num_blocks": len(scores) // 4 + 1,
        "block_size": 4,
    }
    return implementation.topk_slots(**arguments)


@pytest.mark.parametrize("scores", SCORES)
def test_rows_around_k_are_those_of_the_definition(implementation: Implementation, scores: Scores) -> None:
    check_topk_slots(implementation, TopkCase(scores=scores))


@pytest.mark.parametrize("topk", [1, 2, 3, 7, 64, 100, 512, 1000, 1024, 2048, 4096])
@pytest.mark.parametrize("scores", SCORES)
def test_every_k_selects_what_the_definition_selects(
    implementation: Implementation, scores: Scores, topk: int
) -> None:
    lengths = (5000, topk, topk + 1, topk - 1, 4097, 0, 1, 3 * topk)
    check_topk_slots(implementation, TopkCase(lengths=lengths, topk=topk, scores=scores, seed=topk))


@pytest.mark.parametrize("scores", ["random", "plateau", "close"])
def test_production_rows_are_those_of_the_definition(implementation: Implementation, scores: Scores) -> None:
    check_topk_slots(implementation, TopkCase(lengths=(131072, 40000), topk=2048, scores=scores))


@pytest.mark.parametrize("block_size", [1, 3, 8, 64, 100])
def test_slots_follow_the_block_table(implementation: Implementation, block_size: int) -> None:
    check_topk_slots(implementation, TopkCase(block_size=block_size))


@pytest.mark.parametrize("scores", SCORES)
def test_scores_with_a_row_stride_select_the_same(implementation: Implementation, scores: Scores) -> None:
    check_topk_slots(implementation, TopkCase(scores=scores, has_row_stride=True))


def test_topk_returns_every_slot_when_context_is_shorter_than_k(implementation: Implementation) -> None:
    arguments = TopkCase(lengths=(5, 8, 7), topk=8).arguments()
    arguments["logits"][:] = np.nan
    selection = implementation.topk_slots(**arguments)
    assert selection.positions.tolist() == [
        [0, 1, 2, 3, 4, -1, -1, -1],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 5, 6, -1],
    ]
    assert selection.counts.tolist() == [5, 8, 7]


def test_lengths_around_k_in_one_batch(implementation: Implementation) -> None:
    check_topk_slots(implementation, TopkCase(lengths=(7, 8, 9), topk=8))


@pytest.mark.parametrize(
    ("scores", "topk", "expected"),
    [
        ([1, 3, 3, 2, 3, 0], 2, [1, 2]),
        ([1, 3, 3, 2, 3, 0], 3, [1, 2, 4]),
        ([0.0, -0.0, 0.0, -0.0], 2, [0, 1]),
        ([np.nan, 1, np.nan, -np.inf], 3, [0, 1, 3]),
        ([0.530330, -0.530330, 0.530330, 0], 1, [0]),
        ([0.530330, -0.530330, 0.530330, 0], 3, [0, 2, 3]),
        ([0.530330, -0.530330, 0.530330, 0], 5, [0, 1, 2, 3, -1]),
        ([-1, -3, -2, -np.inf, np.inf], 2, [0, 4]),
    ],
)
def test_documented_rows(implementation: Implementation, scores: list[float], topk: int, expected: list[int]) -> None:
    assert select(implementation, np.array(scores, np.float32), topk).positions.tolist() == [expected]


def test_a_block_outside_the_cache_gives_slot_minus_one_and_keeps_the_position(
    implementation: Implementation,
) -> None:
    arguments = TopkCase(lengths=(6, 6, 6, 6), topk=6, block_size=2).arguments()
    for row, invalid in enumerate([-1, -(2**31), arguments["num_blocks"], 2**31 - 1]):
        arguments["block_table"][arguments["request_ids"][row], 1] = invalid
    selection = implementation.topk_slots(**arguments)
    assert np.all(selection.positions == np.arange(6))
    assert np.all(selection.slot_ids[:, 2:4] == -1)
    assert np.all(selection.slot_ids[:, [0, 1, 4, 5]] >= 0)
    assert selection.counts.tolist() == [6] * 4


def test_an_empty_batch_gives_empty_results(implementation: Implementation) -> None:
    check_topk_slots(implementation, TopkCase(lengths=()))


def test_rows_of_length_zero_or_less_are_all_minus_one(implementation: Implementation) -> None:
    arguments = TopkCase(lengths=(0, -1, -(2**31), 0), topk=4).arguments()
    selection = implementation.topk_slots(**arguments)
    assert np.all(selection.positions == -1)
    assert np.all(selection.slot_ids == -1)
    assert np.all(selection.counts == 0)


@pytest.mark.parametrize("scores", SCORES)
def test_selection_does_not_depend_on_threads_or_neighbours(implementation: Implementation, scores: Scores) -> None:
    arguments = TopkCase(lengths=(900, 33, 0, 5000, 32, 700, 64, 2000), scores=scores).arguments()
    together = implementation.topk_slots(**arguments)
    for num_threads in (1, 2, 4):
        threaded = implementation.on_threads(num_threads)
        assert_same_selection(threaded.topk_slots(**arguments), together)
        for row in range(8):
            alone = {
                name: np.ascontiguousarray(arguments[name][row : row + 1])
                for name in ("logits", "lengths", "request_ids")
            }
            expected = IndexSelection(*(array[row : row + 1] for array in together))
            assert_same_selection(threaded.topk_slots(**arguments | alone), expected)


def test_fifty_repetitions_over_planted_ties_are_identical(implementation: Implementation) -> None:
    arguments = TopkCase(lengths=(20000, 3000, 3000), topk=512, scores="plateau").arguments()
    first = implementation.topk_slots(**arguments)
    for _ in range(49):
        assert_same_selection(implementation.topk_slots(**arguments), first)


@settings(max_examples=60, deadline=None, suppress_health_check=SHARED_FIXTURE, derandomize=True)
@given(
    scores=st.lists(
        st.one_of(
            st.floats(width=32),
            st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf"), float("-inf"), 1e-45, -1e-45]),
        ),
        min_size=1,
        max_size=200,
    ),
    topk=st.integers(1, 210),
)
def test_any_scores_select_what_a_sort_selects(implementation: Implementation, scores: list[float], topk: int) -> None:
    # Independent of the reference: Python's stable sort by (NaN last, larger first).
    row = np.array(scores, np.float32)
    rank = sorted(range(len(row)), key=lambda s: (bool(np.isnan(row[s])), 0.0 if np.isnan(row[s]) else -float(row[s])))
    expected = sorted(rank[:topk])
    selection = select(implementation, row, topk)
    assert selection.positions[0].tolist() == expected + [-1] * (topk - len(expected))
