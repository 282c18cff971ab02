"""Hugging Face safetensors folders, read into float32 NumPy arrays one tensor at a time."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from fastdeploy_dsa.strict_json import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"

_FP8 = "F8_E4M3"
_FP4 = "I8"  # two numbers a byte: safetensors has no name for them
_POWERS = "F8_E8M0"
_NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", _FP8: "u1", _FP4: "u1", _POWERS: "u1"}  # small as bits
_INTEGERS = {"I64": "<i8", "I32": "<i4"}
_FP4_BLOCK = (1, 32)  # rows and columns that share a scale
_NAMES_SHOWN = 5

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the text names the file or the tensor."""


@dataclass(frozen=True)
class _StoredTensor:
    """Where a tensor lies.

    Attributes:
        dtype: As safetensors writes it: BF16, F8_E4M3, ...
        start: First byte in the file.
        stop: Byte after the last.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        is_packed = self.dtype == _FP4 and self.shape
        return (*self.shape[:-1], 2 * self.shape[-1]) if is_packed else self.shape

    def require_shape(self, expected: tuple[int, ...]) -> None:
        if self.unpacked_shape != expected:
            raise CheckpointError(f"{self.path}: {self.name}: expected shape {expected}, got {self.unpacked_shape}")


def load_weights(
    folder: str | Path,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] | None = None,
    leftover_reason: Callable[[str], str | None],
    weight_block_size: tuple[int, int] | None = None,
    integers: Collection[str] = (),
    on_tensor: Callable[[int, int], None] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Load the named tensors; only one tensor is held twice at any time.

    Args:
        folder: Holds config.json and model.safetensors, or model.safetensors.index.json and the files it lists.
        shapes: Every tensor that must be there, with its shape.
        optional: Tensors that are loaded if they are there.
        leftover_reason: Why a tensor of neither mapping is skipped; None makes it an error.
        weight_block_size: Rows and columns of an fp8 weight that share a scale, `<name>_scale_inv` or, beside
            `<name>.weight`, `<name>.scale`. Where two fp4 numbers share a byte, a row's 32 numbers share one.
        integers: Names among shapes of tensors of integers.
        on_tensor: Called after every tensor with the numbers of loaded tensors and of tensors to load.

    Returns:
        Float32 C-contiguous arrays in the order of shapes and then optional; int64 ones of the integers.

    Raises:
        CheckpointError: A file or tensor is missing, unknown, malformed, of the wrong shape or dtype, or not finite.
    """
    stored = _stored_tensors(Path(folder))
    wanted = {**(optional or {}), **shapes}
    _require_present(folder, shapes, stored)
    _skip_leftovers(stored, wanted, leftover_reason)
    present = [name for name in wanted if name in stored]
    for name in present:
        stored[name].require_shape(wanted[name])
    scales = {_scaled_name(name): tensor for name, tensor in stored.items()}
    loaded: dict[str, npt.NDArray[Any]] = {}
    for name in sorted(present, key=lambda name: (stored[name].path, stored[name].start)):
        if name in integers:
            loaded[name] = _int64(stored[name])
        else:
            loaded[name] = _load(stored[name], scales.get(name), weight_block_size)
        if on_tensor is not None:
            on_tensor(len(loaded), len(present))
    return {name: loaded[name] for name in (*shapes, *(optional or {})) if name in loaded}


def _scaled_name(name: str) -> str | None:
    """The tensor that this one has the scales of; None: it has none."""
    if name.endswith(SCALE_SUFFIX):
        return name.removesuffix(SCALE_SUFFIX)
    return name.removesuffix("scale") + "weight" if name.endswith(".scale") else None


def _stored_tensors(folder: Path) -> dict[str, _StoredTensor]:
    """Every tensor of the folder, from the files' headers."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json")
    has_single, has_index = (folder / SINGLE_FILE).is_file(), (folder / INDEX_FILE).is_file()
    if not has_single and not has_index:
        raise CheckpointError(f"{folder}: has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")
    if has_single and has_index:
        raise CheckpointError(f"{folder}: has both {SINGLE_FILE} and {INDEX_FILE}, expected one of them")
    if has_single:
        return {tensor.name: tensor for tensor in _read_header(folder / SINGLE_FILE)}
    return _indexed_tensors(folder)


def _indexed_tensors(folder: Path) -> dict[str, _StoredTensor]:
    """The tensors of every file the index lists; index and headers must say the same."""
    file_of = _read_index(folder)
    stored: dict[str, _StoredTensor] = {}
    strays: dict[str, _StoredTensor] = {}
    for file_name in sorted(set(file_of.values())):
        for tensor in _read_header(folder / file_name):
            is_listed = file_of.get(tensor.name) == file_name
            (stored if is_listed else strays)[tensor.name] = tensor
    for name, file_name in file_of.items():
        if name not in stored:
            place = f"it is in {strays[name].path.name}" if name in strays else "no listed file has it"
            raise CheckpointError(f"{folder / INDEX_FILE}: {name} is said to be in {file_name}, but {place}")
    for name, tensor in strays.items():
        entry = f"says it is in {file_of[name]}" if name in file_of else "does not list it"
        raise CheckpointError(f"{tensor.path}: holds {name}, but {INDEX_FILE} {entry}")
    return stored


def _read_index(folder: Path) -> dict[str, str]:
    """The file name of every tensor name; the files exist."""
    path = folder / INDEX_FILE
    file_of = read_json_object(path, CheckpointError).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise CheckpointError(f"{path}: weight_map: expected an object of tensor and file names, got {file_of!r}")
    for name, file_name in file_of.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{path}: {name}: expected the name of a file in the folder, got {file_name!r}")
        if not (folder / file_name).is_file():
            raise CheckpointError(f"{path}: {name} is said to be in {file_name}, which does not exist")
    return file_of


def _read_header(path: Path) -> list[_StoredTensor]:
    """The tensors of a file whose header, sizes and length the safetensors library found consistent."""
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
    except (SafetensorError, OSError, ValueError) as reason:
        raise CheckpointError(f"{path}: not a complete safetensors file: {reason}") from None
    first = 8 + header_bytes
    header.pop("__metadata__", None)
    return [
        _StoredTensor(
            name=name,
            path=path,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=first + entry["data_offsets"][0],
            stop=first + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    ]


def _require_present(folder: str | Path, shapes: Mapping[str, object], stored: Mapping[str, _StoredTensor]) -> None:
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shapes)} tensors are missing: {_first_names(missing)}"
        )


def _skip_leftovers(
    stored: Mapping[str, _StoredTensor], wanted: Mapping[str, object], leftover_reason: Callable[[str], str | None]
) -> None:
    """Log how many tensors are skipped and why; a scale belongs to its weight."""
    reasons: Counter[str] = Counter()
    unknown = []
    for name, tensor in stored.items():
        weight_name = _scaled_name(name) or name
        if weight_name != name and weight_name not in stored:
            raise CheckpointError(f"{tensor.path}: {name}: there is no tensor {weight_name} that it scales")
        if weight_name in wanted:
            continue
        reason = leftover_reason(weight_name)
        if reason is None:
            unknown.append(name)
        else:
            reasons[reason] += 1
    if unknown:
        first = stored[min(unknown)].path
        raise CheckpointError(f"{first}: unknown tensor: {_first_names(unknown)} ({len(unknown)} in the checkpoint)")
    for reason, count in sorted(reasons.items()):
        logger.info("skipped %d tensors: %s", count, reason)


def _load(
    tensor: _StoredTensor, scale: _StoredTensor | None, weight_block_size: tuple[int, int] | None
) -> npt.NDArray[np.float32]:
    if tensor.dtype in (_FP8, _FP4):
        values = _dequantized(tensor, scale, _FP4_BLOCK if tensor.dtype == _FP4 else weight_block_size)
    elif scale is not None:
        expected = f"{_FP8} or {_FP4}"
        raise CheckpointError(
            f"{scale.path}: {scale.name}: scales a tensor of dtype {tensor.dtype}, expected {expected}"
        )
    else:
        values = _float32(tensor)
    _require_finite(tensor, values)
    return values


def _dequantized(
    tensor: _StoredTensor, scale: _StoredTensor | None, block_size: tuple[int, int] | None
) -> npt.NDArray[np.float32]:
    """Values times block scales, in float32; the last block of a row or column may be short."""
    where = f"{tensor.path}: {tensor.name}"
    if block_size is None:
        raise CheckpointError(f"{where}: dtype {_FP8}, but the config has no quantization_config.weight_block_size")
    if scale is None:
        raise CheckpointError(f"{where}: dtype {tensor.dtype}, but the tensor with its scales is missing")
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{where}: expected two dimensions for dtype {tensor.dtype}, got shape {tensor.shape}")
    if scale.dtype not in ("F32", _POWERS):
        raise CheckpointError(f"{scale.path}: {scale.name}: expected dtype F32 or {_POWERS}, got {scale.dtype}")
    rows, columns = tensor.unpacked_shape
    block_rows, block_columns = block_size
    scale.require_shape((-(-rows // block_rows), -(-columns // block_columns)))
    scales = _float32(scale)
    _require_finite(scale, scales)
    values = _float32(tensor)
    for block_row, row_scales in enumerate(scales):
        rows_of_block = values[block_row * block_rows : (block_row + 1) * block_rows]
        with np.errstate(over="ignore"):  # an overflow is reported as a value that is not finite
            rows_of_block *= np.repeat(row_scales, block_columns)[:columns]
    return values


def _float32(tensor: _StoredTensor) -> npt.NDArray[np.float32]:
    """A copy of the stored values, unscaled."""
    stored = _stored_array(tensor, _NUMPY_DTYPES)
    if tensor.dtype == _FP8:
        return np.take(_E4M3_VALUES, stored)
    if tensor.dtype == _POWERS:
        return np.take(_E8M0_VALUES, stored)
    if tensor.dtype == _FP4:
        return np.take(_E2M1_PAIRS, stored, axis=0).reshape(tensor.unpacked_shape)
    if tensor.dtype == "BF16":
        bits = np.empty(tensor.shape, dtype=np.uint32)
        np.left_shift(stored, np.uint32(16), out=bits)
        return bits.view(np.float32)
    return np.array(stored, dtype=np.float32, order="C")


def _int64(tensor: _StoredTensor) -> npt.NDArray[np.int64]:
    return np.array(_stored_array(tensor, _INTEGERS), dtype=np.int64, order="C")


def _stored_array(tensor: _StoredTensor, dtypes: Mapping[str, str]) -> npt.NDArray[Any]:
    """A view of the file."""
    if tensor.dtype not in dtypes:
        expected = ", ".join(dtype for dtype in dtypes if dtype not in (_FP4, _POWERS))
        raise CheckpointError(f"{tensor.path}: {tensor.name}: expected dtype {expected}, got {tensor.dtype}")
    file_bytes = np.memmap(tensor.path, dtype=np.uint8, mode="r")
    view: npt.NDArray[Any] = file_bytes[tensor.start : tensor.stop].view(dtypes[tensor.dtype])
    return view.reshape(tensor.shape)


def _e4m3_values() -> npt.NDArray[np.float32]:
    """Value of every e4m3 byte: sign, 4 bits of exponent with bias 7, 3 bits of mantissa, no infinity.

    Source: "FP8 formats for deep learning", arXiv 2209.05433.
    """
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 0xF, byte & 0x7
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    magnitude[byte & 0x7F == 0x7F] = np.nan
    return np.where(byte < 0x80, magnitude, -magnitude).astype(np.float32)


def _e8m0_values() -> npt.NDArray[np.float32]:
    """Value of every e8m0 byte: a power of two, the last byte is no number.

    Source: OCP Microscaling Formats (MX) 1.0, section 5.4.
    """
    values: npt.NDArray[np.float32] = np.ldexp(1.0, np.minimum(np.arange(256), 254) - 127).astype(np.float32)
    values[255] = np.nan
    return values


def _e2m1_pairs() -> npt.NDArray[np.float32]:
    """[256, 2], the numbers of every byte: the low four bits are the first.

    Source: OCP Microscaling Formats (MX) 1.0, section 5.3.3.
    """
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([magnitudes, -magnitudes])
    byte = np.arange(256)
    return np.stack([values[byte & 0xF], values[byte >> 4]], axis=-1)


_E4M3_VALUES = _e4m3_values()
_E8M0_VALUES = _e8m0_values()
_E2M1_PAIRS = _e2m1_pairs()


def _require_finite(tensor: _StoredTensor, values: npt.NDArray[np.float32]) -> None:
    is_finite = np.isfinite(values)
    if not is_finite.all():
        place = tuple(int(i) for i in np.unravel_index(np.argmin(is_finite), values.shape))
        raise CheckpointError(f"{tensor.path}: {tensor.name}: {values[place]} at {place}, expected finite numbers")


def _first_names(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
