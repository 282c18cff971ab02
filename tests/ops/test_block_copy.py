from __future__ import annotations

import numpy as np
import pytest

from tests.kit.c_api import CApi
from tests.kit.cases import BlockCopyCase, rejected_block_ids
from tests.kit.checks import check_block_copy
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation


@pytest.mark.parametrize(
    ("dtype", "block_shape"),
    [
        ("uint8", (64, 132)),
        ("uint8", (1, 64, 656)),
        ("uint16", (64, 128)),
        ("float32", (1, 64, 576)),
        ("uint8", (1, 1)),
    ],
)
def test_blocks_arrive_whole_and_alone(
    implementation: Implementation, dtype: str, block_shape: tuple[int, ...]
) -> None:
    check_block_copy(implementation, BlockCopyCase(dtype=dtype, block_shape=block_shape))


@pytest.mark.parametrize("block_bytes", [1, 7, 13, 63, 65, 1000])
def test_blocks_of_any_length_arrive_whole(implementation: Implementation, block_bytes: int) -> None:
    check_block_copy(implementation, BlockCopyCase(block_shape=(block_bytes, 1)))


@pytest.mark.parametrize(("src_gap_bytes", "dst_gap_bytes"), [(0, 5), (9, 0), (3, 17)])
def test_gaps_between_blocks_stay_as_they_are(c_implementation: CApi, src_gap_bytes: int, dst_gap_bytes: int) -> None:
    case = BlockCopyCase(block_shape=(77, 1), src_gap_bytes=src_gap_bytes, dst_gap_bytes=dst_gap_bytes)
    check_block_copy(c_implementation, case)


def test_no_pairs_copy_nothing(implementation: Implementation) -> None:
    check_block_copy(implementation, BlockCopyCase(num_copies=0))


def test_a_source_may_be_copied_to_several_places(implementation: Implementation) -> None:
    arguments = BlockCopyCase().arguments()
    arguments["src_block_ids"][:] = 2
    implementation.block_copy(**arguments)
    for block in arguments["dst_block_ids"]:
        assert_same(arguments["dst"][block], arguments["src"][2], f"block {block}")


def test_blocks_move_inside_one_arena(c_implementation: CApi) -> None:
    arena = BlockCopyCase().arguments()["src"]
    before = arena.copy()
    c_implementation.block_copy(
        src=arena, dst=arena, src_block_ids=np.array([1, 1, 4]), dst_block_ids=np.array([0, 5, 6])
    )
    assert_same(arena, before[[1, 1, 2, 3, 4, 1, 4, 7]], "arena")


@pytest.mark.parametrize("side", ["src", "dst"])
@pytest.mark.parametrize("which", range(4))
def test_a_pair_outside_its_arena_is_refused_and_nothing_is_copied(
    cpu_implementation: Implementation, side: str, which: int
) -> None:
    arguments = BlockCopyCase().arguments()
    arguments[f"{side}_block_ids"][-1] = rejected_block_ids(len(arguments[side]))[which]
    before = arguments["dst"].copy()
    with pytest.raises(ValueError, match=r"block"):
        cpu_implementation.block_copy(**arguments)
    assert_same(arguments["dst"], before, "dst")


def test_the_result_does_not_depend_on_threads(implementation: Implementation) -> None:
    case = BlockCopyCase(num_copies=40)
    for num_threads in (1, 2, 4):
        check_block_copy(implementation.on_threads(num_threads), case)
