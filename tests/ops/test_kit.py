"""The tests' own tools must notice what they are there to notice."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.kit.cases import IndexerCase, SparseMlaCase, TopkCase
from tests.kit.compare import MeaninglessBound, assert_close, assert_same, assert_selects_best
from tests.kit.headers import Headers
from tests.kit.poison import GuardedMemory, invalid_ids, own_memory, poisoned_blocks, whole_memory, with_row_stride


def close(actual: list[float], expected: list[float], bound: float = 1e-3) -> None:
    assert_close(np.array(actual, np.float32), np.array(expected), np.full(len(actual), bound), "x")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([1.0, np.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, np.nan]),
        ([1.0, np.inf], [1.0, 2.0]),
        ([1.0, np.inf], [1.0, -np.inf]),
        ([1.0, np.nan], [1.0, -np.inf]),
        ([1.0, 2.002], [1.0, 2.0]),
    ],
)
def test_a_close_comparison_fails_at_the_second_number(actual: list[float], expected: list[float]) -> None:
    with pytest.raises(AssertionError, match=r"first at \(1,\)"):
        close(actual, expected)


def test_a_close_comparison_accepts_equal_anomalies() -> None:
    close([1.0005, np.nan, np.inf, -np.inf], [1.0, np.nan, np.inf, -np.inf])


def test_a_bound_as_large_as_the_numbers_is_an_error() -> None:
    with pytest.raises(MeaninglessBound):
        close([1.0, 2.0], [1.0, 2.0], bound=0.1)


def test_a_same_comparison_sees_the_sign_of_zero_and_the_bits_of_nan() -> None:
    with pytest.raises(AssertionError, match=r"first at \(1,\)"):
        assert_same(np.array([0.0, -0.0]), np.array([0.0, 0.0]), "x")
    with pytest.raises(AssertionError, match=r"first at \(0,\)"):
        assert_same(np.array([-np.nan], np.float32), np.array([np.nan], np.float32), "x")


@pytest.mark.parametrize("position", [-1, 4])
def test_guards_notice_a_byte_beside_an_output(position: int) -> None:
    memory = GuardedMemory()
    output = memory.output((4,), np.uint8)
    whole = whole_memory(output)
    whole[output.ctypes.data - whole.ctypes.data + position] = 0
    with pytest.raises(AssertionError, match="guard"):
        memory.check()


def test_guards_notice_a_number_between_rows() -> None:
    memory = GuardedMemory()
    output = memory.output((2, 4), np.float32, row_padding=3)
    memory.check()
    np.lib.stride_tricks.as_strided(output, (2, 7))[0, 5] = 0
    with pytest.raises(AssertionError, match="between two rows"):
        memory.check()


def test_a_selection_may_differ_only_within_the_bound() -> None:
    logits, bound = np.array([1.0, 2.0, 2.001, 0.0]), np.full(4, 1e-3)
    assert_selects_best(np.array([1], np.int32), logits, bound, 4, "x")
    assert_selects_best(np.array([2], np.int32), logits, bound, 4, "x")
    for wrong in ([0], [3], [-1], [4]):
        with pytest.raises(AssertionError):
            assert_selects_best(np.array(wrong, np.int32), logits, bound, 4, "x")
    with pytest.raises(AssertionError, match="ascend"):
        assert_selects_best(np.array([2, 1], np.int32), logits, bound, 4, "x")
    with pytest.raises(AssertionError, match="tail"):
        assert_selects_best(np.array([0, 1, 2], np.int32), logits, bound, 2, "x")


def test_blocks_with_gaps_and_rows_with_strides_hold_what_was_put_in() -> None:
    blocks = poisoned_blocks(3, (2, 5), np.uint16, gap_bytes=6)
    assert blocks.strides == (26, 10, 2)
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    view = with_row_stride(values)
    assert_same(np.ascontiguousarray(view), values, "x")
    assert view.strides[0] > values.strides[0]


def test_every_case_keeps_poisoned_spare_slots_and_invalid_ids() -> None:
    latent = SparseMlaCase(cache_format="float32").arguments()
    assert np.isnan(latent["latent_cache"]).any()
    index = IndexerCase(cache_format="float32").arguments()
    assert np.isnan(index["index_cache"]).any()
    num_blocks = len(index["index_cache"])
    assert set(invalid_ids(num_blocks, np.int32)) <= set(index["block_table"].reshape(-1).tolist())
    assert not np.isfinite(TopkCase().arguments()["logits"][1]).any()


def test_a_case_builds_the_same_arguments_every_time() -> None:
    for case in (IndexerCase(seed=5), TopkCase(seed=5), SparseMlaCase(seed=5)):
        first, second = case.arguments(), case.arguments()
        for name, value in first.items():
            if isinstance(value, np.ndarray):
                assert_same(np.ascontiguousarray(value), np.ascontiguousarray(second[name]), name)


def test_memory_of_a_view_is_all_of_its_allocation_or_what_it_spans() -> None:
    blocks = poisoned_blocks(3, (2, 5), np.uint16, gap_bytes=6)
    assert own_memory(blocks).size == 2 * 26 + 20
    assert whole_memory(blocks).size > own_memory(blocks).size
    for shape in ((4, 6), (2, 3, 4)):  # NumPy makes the second with an object of its own in between
        view = with_row_stride(np.zeros(shape, np.float32), padding=5)
        whole, own = whole_memory(view), own_memory(view)
        assert whole.size == shape[0] * (int(np.prod(shape[1:])) + 5) * 4
        assert own.size == whole.size - 5 * 4
        assert own.ctypes.data == view.ctypes.data
        own[:] = 0x3F
        assert np.all(view.copy().view(np.uint8) == 0x3F)
    assert own_memory(view[:0]).size == 0


def test_a_struct_inside_a_struct_has_fields_of_both_names() -> None:
    headers = Headers()
    outer, inner = "dsa_layer_write_params", "dsa_mla_cache_write_params"
    fields = headers.fields(outer)
    assert {f"latent.{name}" for name in headers.fields(inner)} < set(fields)
    assert headers.structs[outer].index_key.offset == ctypes.sizeof(headers.structs[inner])
    assert {"latent.rope", "index_query.weights"} <= headers.read_only(outer)
    assert not {"latent.cache", "index_query.quantized", "latent.num_tokens"} & headers.read_only(outer)
