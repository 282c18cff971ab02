"""Reading safetensors folders: every stored dtype exactly, in any arrangement of files, one tensor at a time."""

from __future__ import annotations

import logging
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastdeploy_dsa.models.checkpoint import CheckpointError
from tests.kit.safetensors_files import (
    UNHURRIED,
    Stored,
    bf16,
    e4m3,
    e4m3_value,
    f16,
    f32,
    load,
    write_shards,
    write_single,
)

VALUES = [[1.5, -2.0, 0.0], [3.25, 448.0, -0.0078125]]


@pytest.mark.parametrize("store", [f32, f16, bf16])
def test_floats_are_read_exactly(tmp_path: Path, store: Any) -> None:
    loaded = load(write_single(tmp_path, {"w": store(VALUES)}), {"w": (2, 3)})
    assert loaded["w"].dtype == np.float32
    assert loaded["w"].flags.c_contiguous
    assert loaded["w"].flags.writeable
    assert loaded["w"].tolist() == VALUES


def test_every_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    bits = bits[(bits & 0x7F80) != 0x7F80]  # without NaN and infinity
    stored = Stored("BF16", bits.shape, bits.tobytes())
    loaded = load(write_single(tmp_path, {"w": stored}), {"w": bits.shape})["w"]
    assert np.array_equal(loaded.view(np.uint32), bits.astype(np.uint32) << 16)


def test_every_e4m3_is_read_exactly(tmp_path: Path) -> None:
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    tensors = {"w": e4m3([codes]), "w_scale_inv": f32([[1.0]])}
    loaded = load(write_single(tmp_path, tensors), {"w": (1, 254)}, weight_block_size=(1, 254))
    assert loaded["w"].tolist() == [[e4m3_value(code) for code in codes]]


@UNHURRIED
@given(
    codes=hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 126)),
    block=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    exponents=hnp.arrays(np.int8, (9, 9), elements=st.integers(-30, 30)),
    mantissa=st.sampled_from([1.0, 1.3]),
)
def test_a_value_is_multiplied_by_the_scale_of_its_block(
    tmp_path: Path, codes: Any, block: tuple[int, int], exponents: Any, mantissa: float
) -> None:
    rows, columns = codes.shape
    scales = np.ldexp(np.float32(mantissa), exponents)[: math.ceil(rows / block[0]), : math.ceil(columns / block[1])]
    folder = write_single(tmp_path, {"w": e4m3(codes), "w_scale_inv": f32(scales)})
    loaded = load(folder, {"w": codes.shape}, weight_block_size=block)["w"]
    for i in range(rows):
        for j in range(columns):
            expected = np.float32(e4m3_value(int(codes[i, j]))) * np.float32(scales[i // block[0], j // block[1]])
            assert loaded[i, j] == expected, (i, j)


def test_tensors_at_odd_offsets_are_read(tmp_path: Path) -> None:
    tensors = {
        "w": e4m3([[0x38] * 3]),  # 3 bytes, so that what follows is not aligned
        "w_scale_inv": f32([[2.0]]),
        "b": bf16([1.5]),
        "c": f32([-7.0]),
        "d": f16([0.5]),
    }
    shapes = {"w": (1, 3), "b": (1,), "c": (1,), "d": (1,)}
    loaded = load(write_single(tmp_path, tensors), shapes, weight_block_size=(128, 128))
    assert {name: array.tolist() for name, array in loaded.items()} == {
        "w": [[2.0] * 3],
        "b": [1.5],
        "c": [-7.0],
        "d": [0.5],
    }


@pytest.mark.parametrize(("values", "shape"), [(3.0, ()), ([], (0,)), (np.zeros((2, 0)), (2, 0))])
def test_scalars_and_empty_tensors_are_read(tmp_path: Path, values: Any, shape: tuple[int, ...]) -> None:
    loaded = load(write_single(tmp_path, {"w": f32(values), "z": bf16([1.0])}), {"w": shape, "z": (1,)})
    assert loaded["w"].shape == shape
    assert loaded["w"].tolist() == np.asarray(values).tolist()


def test_shards_are_read_and_a_scale_may_lie_in_another_file(tmp_path: Path) -> None:
    folder = write_shards(
        tmp_path,
        {"w": e4m3([[0x38, 0x40]]), "a": f32([1.0])},
        {"w_scale_inv": f32([[0.5]]), "b": bf16([2.0])},
    )
    loaded = load(folder, {"b": (1,), "w": (1, 2), "a": (1,)}, weight_block_size=(128, 128))
    assert list(loaded) == ["b", "w", "a"]
    assert loaded["w"].tolist() == [[0.5, 1.0]]


def test_optional_tensors_are_loaded_if_they_are_there(tmp_path: Path) -> None:
    folder = write_single(tmp_path, {"a": f32([1.0]), "here": f32([2.0])})
    loaded = load(folder, {"a": (1,)}, optional={"absent": (4,), "here": (1,)})
    assert {name: array.tolist() for name, array in loaded.items()} == {"a": [1.0], "here": [2.0]}


def test_optional_tensors_are_checked_like_the_others(tmp_path: Path) -> None:
    folder = write_single(tmp_path, {"a": f32([1.0]), "here": f32([2.0])})
    with pytest.raises(CheckpointError, match=re.escape("here: expected shape (2,), got (1,)")):
        load(folder, {"a": (1,)}, optional={"here": (2,)})


def test_leftovers_are_skipped_with_one_log_line_per_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {
        "a": f32([1.0]),
        "mtp.x": f32([math.nan]),
        "mtp.w": e4m3([[0x38]]),
        "mtp.w_scale_inv": f32([[1.0]]),
        "extra": Stored("I64", (1,), b"\0" * 8),
    }
    with caplog.at_level(logging.INFO, "fastdeploy_dsa"):
        reasons = {"mtp.x": "draft layer", "mtp.w": "draft layer", "extra": "a counter"}
        loaded = load(write_single(tmp_path, tensors), {"a": (1,)}, leftover_reason=reasons.get)
    assert list(loaded) == ["a"]
    assert [record.getMessage() for record in caplog.records] == [
        "skipped 1 tensors: a counter",
        "skipped 3 tensors: draft layer",
    ]


def test_progress_counts_every_loaded_tensor(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    folder = write_shards(tmp_path, {"a": f32([1.0]), "x": f32([1.0])}, {"b": f32([1.0]), "c": f32([1.0])})
    load(
        folder,
        {"a": (1,), "b": (1,)},
        optional={"c": (1,), "d": (1,)},
        leftover_reason=lambda name: "no use",
        on_tensor=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
def test_no_second_copy_of_the_checkpoint_is_held(tmp_path: Path, dtype: str) -> None:
    count, side = 32, 128
    store = {"F32": f32, "BF16": bf16, "F8_E4M3": lambda values: e4m3(np.zeros((side, side)))}[dtype]
    tensors = {f"w{i}": store(np.zeros((side, side))) for i in range(count)}
    if dtype == "F8_E4M3":
        tensors |= {f"w{i}_scale_inv": f32(np.ones((4, 4))) for i in range(count)}
    folder = write_single(tmp_path, tensors)
    tracemalloc.start()
    try:
        load(folder, {f"w{i}": (side, side) for i in range(count)}, weight_block_size=(32, 32))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tensor_bytes = side * side * 4
    assert count * tensor_bytes <= peak_bytes < (count + 4) * tensor_bytes


def test_denormal_weights_survive(tmp_path: Path) -> None:
    smallest = float(np.finfo(np.float32).tiny) / 4
    assert load(write_single(tmp_path, {"w": f32([smallest])}), {"w": (1,)})["w"].tolist() == [smallest]
