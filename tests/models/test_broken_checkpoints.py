"""Every broken checkpoint is named: folders, files, headers, indices and tensors."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_dsa.models.checkpoint import INDEX_FILE, SINGLE_FILE, CheckpointError
from tests.kit.safetensors_files import (
    UNHURRIED,
    Stored,
    bf16,
    e4m3,
    f16,
    f32,
    load,
    safetensors_bytes,
    write_shards,
    write_single,
)


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
