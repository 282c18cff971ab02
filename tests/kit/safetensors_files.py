"""Safetensors files that tests write byte by byte."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from fastdeploy_dsa.models.checkpoint import INDEX_FILE, SINGLE_FILE, load_weights

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
