"""What the headers promise of every op alike: sizes, statuses, and refusals that touch nothing."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.compressed_cache_layout import row_layout
from fastdeploy_dsa.ops import reference
from tests.kit.c_api import CApi, CCpu
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
from tests.kit.compressed_cases import (
    CompressedMlaCase,
    CompressedRowReadCase,
    CompressedRowWriteCase,
    InverseRopeCase,
    KvCompressCase,
)
from tests.kit.headers import INCLUDE, Headers
from tests.kit.implementation import Refused
from tests.kit.poison import GuardedMemory

OPS: dict[str, dict[str, Any]] = {
    "block_copy": BlockCopyCase().arguments(),
    "compressed_mla": CompressedMlaCase(
        window_counts=(40, 0, 5), entry_counts=(70, 0, 5), entry_block_rows=64
    ).arguments(),
    "compressed_row_read": CompressedRowReadCase().arguments(),
    "compressed_row_write": CompressedRowWriteCase().arguments(),
    "index_key_write": IndexKeyWriteCase().arguments(),
    "index_query_quant": IndexQueryQuantCase().arguments(),
    "index_select": IndexerCase().selection_arguments(topk=8),
    "indexer_logits": IndexerCase().arguments(),
    "inverse_rope": InverseRopeCase().arguments(),
    "kv_compress": KvCompressCase(head_dim=128, entry_kind="index_key").arguments(),
    "layer_write": LayerWriteCase().arguments(),
    "mla_cache_write": MlaCacheWriteCase().arguments(),
    "sparse_mla": SparseMlaCase(counts=(70, 0, 5)).arguments(),
    "topk_slots": TopkCase().arguments(),
}
FIELDS = [
    (op, name, kind)
    for op in OPS
    for name, kind in Headers().fields(f"dsa_{op}_params").items()
    if name not in {"workspace", "workspace_bytes"}
]
POINTERS = [(op, name) for op, name, kind in FIELDS if kind is ctypes.c_void_p]
CODES = ("_format", "_kind")
NO_COUNTS = (*CODES, "_stride", "max_logits_bytes", "batch_invariant")  # codes, distances, a budget, a switch
COUNTS = [
    (op, name)
    for op, name, kind in FIELDS
    if kind in {ctypes.c_int32, ctypes.c_int64} and not name.endswith(NO_COUNTS)
]
FORMATS = [(op, name) for op, name, _ in FIELDS if name.endswith(CODES)]
ID_LIMITS = [
    *((op, "num_blocks") for op in ("index_select", "sparse_mla", "topk_slots")),
    *(("compressed_mla", name) for name in ("window_num_blocks", "entry_num_blocks")),
]


@dataclass(frozen=True)
class Recorder(CCpu):
    """Keeps the fields of a call instead of making it."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def call(self, op: str, memory: GuardedMemory, **fields: Any) -> None:
        self.calls.append(fields)


def fields_of(implementation: CApi, op: str) -> dict[str, Any]:
    """The params of a valid call."""
    recorder = Recorder(implementation.library)
    getattr(recorder, op)(**OPS[op])
    return recorder.calls[0]


def host_params(implementation: CApi, op: str, **changes: Any) -> ctypes.Structure:
    """The params of a valid call with changed fields; addresses are of the host."""
    fields = fields_of(implementation, op) | changes
    return implementation.params(op, fields, lambda array: int(array.ctypes.data))


def status_of(implementation: CApi, op: str, **changes: Any) -> str:
    """The name of the status of a call with changed fields."""
    names = {value: name for name, value in implementation.library.headers.constants.items() if is_status(name)}
    try:
        implementation.call(op, GuardedMemory(), **fields_of(implementation, op) | changes)
    except Refused as refusal:
        return names[refusal.status]
    return "DSA_OK"


def is_status(name: str) -> bool:
    """DSA_OK and the constants that stand beside it."""
    text = (INCLUDE / "common.h").read_text()
    (body,) = re.findall(r"enum\s*\{([^}]*DSA_OK[^}]*)\}", text)
    return name in re.findall(r"DSA_\w+", body)


@pytest.mark.parametrize("op", OPS)
def test_the_valid_call_is_accepted(c_implementation: CApi, op: str) -> None:
    assert status_of(c_implementation, op) == "DSA_OK"


def test_every_struct_is_as_large_as_its_header_says(c_implementation: CApi) -> None:
    for name in c_implementation.library.headers.structs:
        c_implementation.library.struct(name)


@pytest.mark.parametrize(("op", "name"), POINTERS)
def test_a_null_pointer_is_refused_unless_the_header_allows_it(c_implementation: CApi, op: str, name: str) -> None:
    header = (INCLUDE / f"{op}.h").read_text()
    may_be_null = re.search(rf"\b{name};\s*/\*[^*]*may be null", header)
    status = status_of(c_implementation, op, **{name: None})
    assert status == ("DSA_OK" if may_be_null else "DSA_NULL_POINTER")


@pytest.mark.parametrize(("op", "name"), COUNTS)
def test_a_negative_count_is_refused(c_implementation: CApi, op: str, name: str) -> None:
    assert status_of(c_implementation, op, **{name: -1}) == "DSA_BAD_SHAPE"


@pytest.mark.parametrize(("op", "name"), FORMATS)
def test_an_unknown_format_is_refused(c_implementation: CApi, op: str, name: str) -> None:
    for code in (-1, 77):
        assert status_of(c_implementation, op, **{name: code}) == "DSA_BAD_FORMAT"


@pytest.mark.parametrize(("op", "name"), ID_LIMITS)
def test_a_cache_with_more_slots_than_int32_is_refused(c_implementation: CApi, op: str, name: str) -> None:
    for num_blocks in (2**31 // 64, 2**40, 2**62):
        assert status_of(c_implementation, op, **{name: num_blocks}) == "DSA_BAD_SHAPE"


@pytest.mark.parametrize(
    "op", ["compressed_mla", "index_select", "indexer_logits", "kv_compress", "sparse_mla", "topk_slots"]
)
def test_a_workspace_that_is_too_small_is_refused(c_implementation: CApi, op: str) -> None:
    params = host_params(c_implementation, op)
    needed = c_implementation.workspace_bytes(op, params)
    if needed == 0:
        return
    memory = GuardedMemory().workspace(needed)
    params.workspace = memory.ctypes.data
    params.workspace_bytes = needed - 1
    status = c_implementation.status_of_call(op, params)
    assert status == c_implementation.library.headers.constants["DSA_WORKSPACE_TOO_SMALL"]


@pytest.mark.parametrize("op", OPS)
def test_an_instruction_set_that_does_not_exist_is_unsupported(c_cpu_implementation: CApi, op: str) -> None:
    library = c_cpu_implementation.library
    params = host_params(c_cpu_implementation, op)
    options = library.struct("dsa_cpu_options")(1, 99)
    status = library.call(f"dsa_{op}_cpu", ctypes.byref(params), ctypes.byref(options))
    assert status == library.headers.constants["DSA_UNSUPPORTED"]


def test_every_status_has_a_text_of_its_own(c_implementation: CApi) -> None:
    library = c_implementation.library
    statuses = [value for name, value in library.headers.constants.items() if is_status(name)]
    texts = [library.status_text(status) for status in statuses]
    assert len(set(texts)) == len(texts)
    assert library.status_text(-1) == library.status_text(10_000) == "unknown status"


@pytest.mark.parametrize("kv_lora_rank", [1, 5, 127, 128, 129, 512])
@pytest.mark.parametrize("qk_rope_head_dim", [1, 2, 3, 64])
def test_latent_offsets_of_the_library_are_those_of_the_reference(
    c_implementation: CApi, kv_lora_rank: int, qk_rope_head_dim: int
) -> None:
    library, fields = c_implementation.library, reference.caches.LatentFields(kv_lora_rank, qk_rope_head_dim)
    fp8 = library.headers.constants["DSA_FP8"]
    assert library.call("dsa_latent_scale_offset", fp8, kv_lora_rank) == fields.scale_offset
    assert library.call("dsa_latent_rope_offset", fp8, kv_lora_rank) == fields.rope_offset
    assert library.call("dsa_latent_row_bytes", fp8, kv_lora_rank, qk_rope_head_dim) == fields.row_bytes


@pytest.mark.parametrize("value_dim", [2, 62, 64, 66, 448, 512, 514, 1024])
@pytest.mark.parametrize("qk_rope_head_dim", [2, 32, 64])
@pytest.mark.parametrize("block_rows", [1, 2, 64])
def test_bytes_of_compressed_rows_are_those_of_the_reference_and_of_the_cache_layout(
    c_implementation: CApi, value_dim: int, qk_rope_head_dim: int, block_rows: int
) -> None:
    library, head_dim = c_implementation.library, value_dim + qk_rope_head_dim
    memory = np.zeros((1, 1 << 20), np.uint8)
    data, scales = reference.compressed.compressed_block_fields(memory, block_rows, head_dim, qk_rope_head_dim)
    for cache_format in ("fp8", "bfloat16", "float32"):
        code = library.headers.constants[f"DSA_{cache_format}".upper()]
        fields = row_layout(cache_format, head_dim, qk_rope_head_dim).fields
        stored = sum(field.num_bytes for field in fields if field.name != "scale")
        scale = sum(field.num_bytes for field in fields if field.name == "scale")
        assert library.call("dsa_compressed_row_data_bytes", code, head_dim, qk_rope_head_dim) == stored
        assert library.call("dsa_compressed_row_scale_bytes", code, head_dim, qk_rope_head_dim) == scale
        block_bytes = library.call("dsa_compressed_block_bytes", code, block_rows, head_dim, qk_rope_head_dim)
        assert block_bytes == block_rows * (stored + scale)
        if cache_format == "fp8":
            assert (stored, scale) == (data.shape[2], scales.shape[2])


@pytest.mark.parametrize(
    ("head_dim", "qk_rope_head_dim", "block_rows"),
    [(64, 64, 2), (64, 0, 2), (64, -2, 2), (64, 3, 2), (65, 2, 2), (0, 2, 2), (512, 64, 0), (512, 64, -1)],
)
def test_sizes_without_a_layout_have_no_bytes(
    c_implementation: CApi, head_dim: int, qk_rope_head_dim: int, block_rows: int
) -> None:
    library = c_implementation.library
    fp8 = library.headers.constants["DSA_FP8"]
    assert library.call("dsa_compressed_block_bytes", fp8, block_rows, head_dim, qk_rope_head_dim) == -1
    assert library.call("dsa_compressed_block_bytes", 77, 2, 512, 64) == -1


def test_the_reference_and_the_headers_agree_on_the_scales_of_compressed_rows(c_implementation: CApi) -> None:
    constants = c_implementation.library.headers.constants
    assert constants["DSA_COMPRESSED_GROUP"] == reference.compressed.VALUE_GROUP
    assert constants["DSA_COMPRESSED_SCALE_ALIGNMENT"] == reference.compressed.SCALE_ALIGNMENT


def test_the_reference_and_the_headers_agree_on_the_group_of_a_scale(c_implementation: CApi) -> None:
    assert c_implementation.library.headers.constants["DSA_LATENT_GROUP"] == reference.caches.LATENT_GROUP


@pytest.mark.parametrize("op", ["compressed_mla", "sparse_mla"])
def test_an_lse_that_nobody_wants_is_not_needed(c_implementation: CApi, op: str) -> None:
    fields = fields_of(c_implementation, op)
    out, _ = getattr(c_implementation, op)(**OPS[op])
    c_implementation.call(op, GuardedMemory(), **fields | {"lse": None})
    assert np.array_equal(fields["out"], out)
