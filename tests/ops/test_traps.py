"""Known mistakes of other engines that concern a single op; numbers are those of the trap table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from tests.kit import poison
from tests.kit.c_api import CApi
from tests.kit.cases import IndexerCase, SparseMlaCase, TopkCase
from tests.kit.checks import assert_same_selection, check_topk_slots
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation


def test_dsa_t05_rows_of_negative_scores_are_full(implementation: Implementation) -> None:
    arguments = TopkCase(lengths=(300, 40), topk=32).arguments()
    arguments["logits"] = -np.abs(arguments["logits"])
    selection = implementation.topk_slots(**arguments)
    assert np.all(selection.positions >= 0)
    assert_same_selection(selection, reference.topk_slots(**arguments))


def test_dsa_t06_a_long_plateau_of_ties_gives_the_first_positions_every_time(implementation: Implementation) -> None:
    arguments = TopkCase(lengths=(131072,), topk=2048).arguments()
    arguments["logits"][0, :131072] = 1.0
    arguments["logits"][0, 500:131072:1000] = 2.0  # 131 clear winners
    winners = np.arange(500, 131072, 1000)
    ties = np.setdiff1d(np.arange(2048), winners)[: 2048 - len(winners)]
    expected = np.sort(np.concatenate([winners, ties])).astype(np.int32)
    for _ in range(25):
        assert_same(implementation.topk_slots(**arguments).positions[0], expected, "positions")


def test_dsa_t07_negative_zero_ranks_with_zero(implementation: Implementation) -> None:
    arguments = TopkCase(lengths=(1000,), topk=100).arguments()
    signs = np.random.default_rng(4).choice([0.0, -0.0], 1000)
    arguments["logits"][0, :1000] = signs
    arguments["logits"][0, 900:1000] = -1.0
    assert_same(implementation.topk_slots(**arguments).positions[0], np.arange(100, dtype=np.int32), "positions")


@pytest.mark.parametrize("behind", [np.inf, np.nan, 3e38])
def test_dsa_t12_columns_behind_the_length_are_not_read(implementation: Implementation, behind: float) -> None:
    arguments = TopkCase(lengths=(33, 64, 127, 500, 1025), topk=32).arguments()
    clean = implementation.topk_slots(**arguments)
    for row, length in enumerate(arguments["lengths"]):
        arguments["logits"][row, length:] = behind
    assert_same_selection(implementation.topk_slots(**arguments), clean)


def test_dsa_t23_short_rows_in_a_wide_buffer(implementation: Implementation) -> None:
    check_topk_slots(implementation, TopkCase(lengths=(33, 100, 0, 2049, 32), topk=32, width=70_000))


@pytest.mark.parametrize("fill", [0x00, 0x3C, 0x7F])
def test_check_17_the_values_of_unused_bytes_change_nothing(
    c_implementation: CApi, monkeypatch: pytest.MonkeyPatch, fill: int
) -> None:
    """Caches, gaps, workspaces and columns that nobody wrote, filled with 0xFF and with something else."""
    poisoned = results(c_implementation)
    monkeypatch.setattr(poison, "POISON_BYTE", fill)
    for name, array in results(c_implementation).items():
        assert_same(array, poisoned[name], name)


def results(implementation: CApi) -> dict[str, NDArray[Any]]:
    """Of every op that reads a cache, without what the ops leave unwritten."""
    case = IndexerCase(lengths=(130, 0, 65), index_n_heads=8, gap_bytes=32)
    logits = implementation.indexer_logits(**case.arguments())
    visible = np.arange(logits.shape[1]) < np.array(case.lengths)[:, None]
    selection = implementation.index_select(**case.selection_arguments(topk=32))
    out, lse = implementation.sparse_mla(**SparseMlaCase(num_heads=4, counts=(70, 0, 9), gap_bytes=32).arguments())
    return {"logits": np.where(visible, logits, 0), "out": out, "lse": lse, **selection._asdict()}
