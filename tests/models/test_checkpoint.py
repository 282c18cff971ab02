"""Reading safetensors folders: every stored dtype exactly, and every broken checkpoint named."""

from __future__ import annotations

import json
import logging
import math
import re
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastdeploy_dsa.models.checkpoint import INDEX_FILE, SINGLE_FILE, CheckpointError, load_weights

UNHURRIED = settings(  # the machine may be busy; a file that is written anew needs no new folder
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Stored:
    """A tensor as its bytes in a file."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


def f32(values: Any) -> Stored:
    array = np.asarray(values, dtype="<f4")
    return Stored("F32", array.shape, array.tobytes())


def f16(values: Any) -> Stored:
    array = np.asarray(values, dtype="<f2")
    return Stored("F16", array.shape, array.tobytes())


def bf16(values: Any) -> Stored:
    """Values must be bfloat16 numbers."""
    bits = np.asarray(values, dtype="<f4").view("<u4")
    assert not (bits & 0xFFFF).any()
    return Stored("BF16", bits.shape, (bits >> 16).astype("<u2").tobytes())


def e4m3(codes: Any) -> Stored:
    array = np.asarray(codes, dtype=np.uint8)
    return Stored("F8_E4M3", array.shape, array.tobytes())


def e4m3_value(code: int) -> float:
    """A byte's value, by the format's definition."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def safetensors_bytes(tensors: Mapping[str, Stored]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + len(tensor.content)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.content for tensor in tensors.values())


def write_single(folder: Path, tensors: Mapping[str, Stored]) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / SINGLE_FILE).write_bytes(safetensors_bytes(tensors))
    return folder


def write_shards(folder: Path, *shards: Mapping[str, Stored], weight_map: Mapping[str, Any] | None = None) -> Path:
    """Files a.safetensors, b.safetensors, ... and their index, or the given one."""
    (folder / "config.json").write_text("{}")
    names = [f"{letter}.safetensors" for letter in "abcdef"]
    for file_name, tensors in zip(names, shards, strict=False):
        (folder / file_name).write_bytes(safetensors_bytes(tensors))
    true_map = {name: names[i] for i, tensors in enumerate(shards) for name in tensors}
    index = {"metadata": {}, "weight_map": true_map if weight_map is None else weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


def nothing_left_over(name: str) -> str | None:
    return None


def load(folder: Path, shapes: Mapping[str, tuple[int, ...]], **changes: Any) -> dict[str, Any]:
    return load_weights(folder, shapes=shapes, **{"leftover_reason": nothing_left_over, **changes})


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
    with caplog.at_level(logging.INFO):
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


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'no'}: no such folder")):
        load(tmp_path / "no", {})


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    write_single(tmp_path, {"a": f32([1.0])})
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: has no config.json")):
        load(tmp_path, {"a": (1,)})


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(safetensors_bytes({"a": f32([1.0])}))
    message = f"{tmp_path}: has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(tmp_path, {"a": (1,)})


def test_a_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": f32([1.0])})
    write_single(tmp_path, {"a": f32([2.0])})
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: has both {SINGLE_FILE} and {INDEX_FILE}")):
        load(tmp_path, {"a": (1,)})


WHOLE = safetensors_bytes({"a": f32([1.0, 2.0])})
HEADER_BYTES = int.from_bytes(WHOLE[:8], "little")
BROKEN_FILES = {
    "empty": b"",
    "length cut off": WHOLE[:5],
    "header cut off": WHOLE[:30],
    "values missing": WHOLE[: 8 + HEADER_BYTES],
    "last byte missing": WHOLE[:-1],
    "a byte too many": WHOLE + b"\0",
    "huge header length": (1 << 62).to_bytes(8, "little") + WHOLE[8:],
    "no JSON": WHOLE[:8] + b"x" * HEADER_BYTES + WHOLE[8 + HEADER_BYTES :],
    "size and shape differ": WHOLE.replace(b'"shape": [2]', b'"shape": [3]'),
    "unknown dtype": WHOLE.replace(b'"F32"', b'"F99"'),
    "zeros": bytes(len(WHOLE)),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_broken_file_is_named(tmp_path: Path, kind: str) -> None:
    write_single(tmp_path, {})
    (tmp_path / SINGLE_FILE).write_bytes(BROKEN_FILES[kind])
    message = f"{tmp_path / SINGLE_FILE}: not a complete safetensors file: "
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(tmp_path, {"a": (2,)})


@UNHURRIED
@given(place=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255))
def test_a_changed_byte_gives_an_array_or_a_checkpoint_error(tmp_path: Path, place: int, value: int) -> None:
    write_single(tmp_path, {})
    (tmp_path / SINGLE_FILE).write_bytes(WHOLE[:place] + bytes([value]) + WHOLE[place + 1 :])
    try:
        loaded = load(tmp_path, {"a": (2,)})
    except CheckpointError as error:
        assert SINGLE_FILE in str(error) or str(tmp_path) in str(error)  # noqa: PT017 - one of two right answers
    else:
        assert np.isfinite(loaded["a"]).all()


A, B = {"x": f32([1.0])}, {"y": f32([2.0])}


@pytest.mark.parametrize(
    ("shards", "weight_map", "message"),
    [
        ((A,), {"x": "z.safetensors"}, f"{INDEX_FILE}: x is said to be in z.safetensors, which does not exist"),
        (
            (A, B),
            {"x": "a.safetensors", "y": "a.safetensors", "q": "b.safetensors"},
            f"{INDEX_FILE}: y is said to be in a.safetensors, but it is in b.safetensors",
        ),
        (
            (A,),
            {"x": "a.safetensors", "q": "a.safetensors"},
            f"{INDEX_FILE}: q is said to be in a.safetensors, but no listed file has it",
        ),
        ((A | B,), {"x": "a.safetensors"}, f"a.safetensors: holds y, but {INDEX_FILE} does not list it"),
        (
            (A, A | B),
            {"x": "a.safetensors", "y": "b.safetensors"},
            f"b.safetensors: holds x, but {INDEX_FILE} says it is in a.safetensors",
        ),
        ((A,), {"x": "../a.safetensors"}, "x: expected the name of a file in the folder, got '../a.safetensors'"),
        ((A,), {"x": 1}, "x: expected the name of a file in the folder, got 1"),
        ((A,), {}, f"{INDEX_FILE}: weight_map: expected an object of tensor and file names, got {{}}"),
        ((A,), [1], f"{INDEX_FILE}: weight_map: expected an object of tensor and file names, got [1]"),
    ],
)
def test_an_index_that_does_not_fit_the_files_is_named(
    tmp_path: Path, shards: tuple[dict[str, Stored], ...], weight_map: Any, message: str
) -> None:
    write_shards(tmp_path, *shards, weight_map=weight_map)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(tmp_path, {"x": (1,), "y": (1,)})


def test_an_index_that_is_no_json_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, A)
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}')
    with pytest.raises(CheckpointError, match=re.escape(f"{INDEX_FILE}: x: given twice")):
        load(tmp_path, {"x": (1,)})


def test_missing_tensors_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    write_single(tmp_path, A)
    shapes = {"x": (1,), **{f"layer.{i}": (1,) for i in range(7)}}
    message = f"{tmp_path}: 7 of 8 tensors are missing: layer.0, layer.1, layer.2, layer.3, layer.4, ..."
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load(tmp_path, shapes)


F8_WEIGHT, F8_SCALE = e4m3([[0x38] * 5] * 3), f32(np.ones((2, 2)))
NAN_AT_THE_END = f32([[1.0, 2.0], [3.0, math.nan]])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (A | {"stray": f32([1.0])}, "unknown tensor: stray (1 in the checkpoint)"),
        (
            A | {f"stray{i}": f32([1.0]) for i in range(6)},
            "unknown tensor: stray0, stray1, stray2, stray3, stray4, ... (6 in the checkpoint)",
        ),
        ({"x": f32([1.0, 2.0])}, "x: expected shape (1,), got (2,)"),
        ({"x": f32([[1.0]])}, "x: expected shape (1,), got (1, 1)"),
        ({"x": Stored("I64", (1,), b"\0" * 8)}, "x: expected dtype F32, F16, BF16, F8_E4M3, got I64"),
        ({"x": Stored("F8_E5M2", (1,), b"\0")}, "x: expected dtype F32, F16, BF16, F8_E4M3, got F8_E5M2"),
        ({"x": Stored("F64", (1,), b"\0" * 8)}, "x: expected dtype F32, F16, BF16, F8_E4M3, got F64"),
        ({"x": f32([math.nan])}, "x: nan at (0,), expected finite numbers"),
        ({"x": f32([-math.inf])}, "x: -inf at (0,), expected finite numbers"),
        ({"x": f16([math.inf])}, "x: inf at (0,), expected finite numbers"),
        ({"x": bf16([math.inf])}, "x: inf at (0,), expected finite numbers"),
        (A | {"w": NAN_AT_THE_END}, "w: nan at (1, 1), expected finite numbers"),
        (A | {"w_scale_inv": f32([[1.0]])}, "w_scale_inv: there is no tensor w that it scales"),
        (A | {"x_scale_inv": f32([1.0])}, "x_scale_inv: scales a tensor of dtype F32, expected F8_E4M3 or I8"),
        (A | {"v": F8_WEIGHT}, "v: dtype F8_E4M3, but the tensor with its scales is missing"),
        (A | {"v": F8_WEIGHT, "v_scale_inv": f32(np.ones((2, 3)))}, "v_scale_inv: expected shape (2, 2), got (2, 3)"),
        (
            A | {"v": F8_WEIGHT, "v_scale_inv": bf16(np.ones((2, 2)))},
            "v_scale_inv: expected dtype F32 or F8_E8M0, got BF16",
        ),
        (
            A | {"v": F8_WEIGHT, "v_scale_inv": f32([[1.0, 1.0], [math.inf, 1.0]])},
            "v_scale_inv: inf at (1, 0), expected finite numbers",
        ),
        (
            A | {"v": e4m3([[0x38] * 5, [0x38] * 5, [0x38, 0x7F, 0x38, 0x38, 0x38]]), "v_scale_inv": F8_SCALE},
            "v: nan at (2, 1), expected finite numbers",
        ),
        (
            A | {"v": e4m3([[0x7E] * 5] * 3), "v_scale_inv": f32([[1.0, 1.0], [1.0, 3e38]])},
            "v: inf at (2, 3), expected finite numbers",
        ),
        (
            A | {"u": e4m3([1]), "u_scale_inv": f32([1.0])},
            "u: expected two dimensions for dtype F8_E4M3, got shape (1,)",
        ),
    ],
)
def test_a_tensor_that_cannot_be_used_is_named(tmp_path: Path, tensors: dict[str, Stored], message: str) -> None:
    write_single(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{tmp_path / SINGLE_FILE}: {message}')}$"):
        load(tmp_path, {"x": (1,)}, optional={"w": (2, 2), "v": (3, 5), "u": (1,)}, weight_block_size=(2, 3))


def test_fp8_weights_need_a_block_size(tmp_path: Path) -> None:
    write_single(tmp_path, {"v": F8_WEIGHT, "v_scale_inv": F8_SCALE})
    message = "v: dtype F8_E4M3, but the config has no quantization_config.weight_block_size"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(tmp_path, {"v": (3, 5)})


def test_denormal_weights_survive(tmp_path: Path) -> None:
    smallest = float(np.finfo(np.float32).tiny) / 4
    assert load(write_single(tmp_path, {"w": f32([smallest])}), {"w": (1,)})["w"].tolist() == [smallest]
