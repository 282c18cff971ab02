"""What a layer of sparse attention writes, in which order and by how many ops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import Tensor

import fastdeploy_dsa.models  # before the indexer, which it imports and which imports its layers

# isort: split
import fastdeploy_dsa.attention.dsa
import fastdeploy_dsa.attention.mla
import fastdeploy_dsa.indexer
from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.index_schedule import IndexSchedule
from fastdeploy_dsa.ops import CacheFormat, index_query_quant
from fastdeploy_dsa.step import StepMetadata
from tests.kit.compare import assert_same
from tests.kit.serving import Serving, in_one_step, poisoned
from tests.kit.tiny_model import VOCAB_SIZE, write_tiny_model

BLOCK_SIZE = 4
FORMATS: list[CacheFormat] = ["fp8", "bfloat16", "float32"]


def recorded(module: ModuleType, op: str, calls: list[str]) -> Callable[..., Any]:
    run = getattr(module, op)

    def record(**given: Any) -> Any:
        calls.append(op)
        return run(**given)

    return record


def test_layers_that_select_write_by_one_op_and_others_their_latent_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fastdeploy_dsa.models.load_model(write_tiny_model(tmp_path / "two_full_one_shared"))
    serving = Serving(model, [np.random.default_rng(3).integers(0, VOCAB_SIZE, 20)])
    calls: list[str] = []
    for module, ops in {
        fastdeploy_dsa.attention.dsa: ("layer_write", "index_key_write"),
        fastdeploy_dsa.attention.mla: ("mla_cache_write", "sparse_mla"),
        fastdeploy_dsa.indexer: ("index_select",),
    }.items():
        for op in ops:
            monkeypatch.setattr(module, op, recorded(module, op, calls))
    serving.run(in_one_step([20]))
    full = ["layer_write", "index_select", "sparse_mla"]
    assert calls == [*full, *full, "mla_cache_write", "sparse_mla"]


def backend_of(cache_format: CacheFormat) -> DSAAttentionBackend:
    return DSAAttentionBackend(
        index_head_dim=32,
        index_schedule=IndexSchedule(letters="FFS", dialect="pattern", warnings=()),
        kv_lora_rank=128,
        qk_rope_head_dim=16,
        softmax_scale=0.3,
        cache_format=cache_format,
        block_size=BLOCK_SIZE,
    )


def caches_of(backend: DSAAttentionBackend) -> dict[tuple[str, int], Tensor]:
    return {key: poisoned(cache) for key, cache in backend.create_kv_cache(num_layers=3, num_blocks=5).items()}


def content(caches: dict[tuple[str, int], Tensor]) -> dict[tuple[str, int], np.ndarray]:
    return {key: cache.view("uint8").numpy().copy() for key, cache in caches.items()}


STEP = StepMetadata.build(
    token_ids=np.zeros(7, np.int64),
    positions=np.array([0, 1, 2, 3, 4, 0, 1], np.int32),
    request_ids=np.array([0, 0, 0, 0, 0, 1, 1], np.int32),
    block_table=np.array([[4, 0], [2, -1]], np.int32),
    block_size=BLOCK_SIZE,
)


def rows_of(rng: np.random.Generator, *shape: int) -> Tensor:
    return paddle.to_tensor(rng.standard_normal((STEP.num_rows, *shape)).astype(np.float32))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_whether_a_layer_selects_or_not_it_writes_the_same_bytes(cache_format: CacheFormat) -> None:
    rng, backend = np.random.default_rng(5), backend_of(cache_format)
    selecting, given = caches_of(backend), caches_of(backend)
    entries = (rows_of(rng, 128), rows_of(rng, 16), rows_of(rng, 32))
    query, weights = rows_of(rng, 4, 32), rows_of(rng, 4)
    quantised, folded = backend.write_and_quantise(entries, (query, weights), layer_id=1, step=STEP, caches=selecting)
    backend.write_entries(entries, layer_id=1, step=STEP, caches=given)
    before, after = content(caches_of(backend)), content(given)
    for key, written in content(selecting).items():
        assert_same(written, after[key], str(key))
        assert np.array_equal(written, before[key]) == (key[1] != 1), f"{key}: only layer 1 is written"
    expected = index_query_quant(query=query, weights=weights, cache_format=cache_format)
    assert_same(quantised.view("uint8").numpy(), expected[0].view("uint8").numpy(), "query")
    assert_same(folded.numpy(), expected[1].numpy(), "folded weights")


@pytest.mark.parametrize(("layer_id", "num_parts", "expected"), [(1, 2, 3), (2, 3, 2)])
def test_entries_that_are_not_the_layers_caches_are_refused(layer_id: int, num_parts: int, expected: int) -> None:
    rng, backend = np.random.default_rng(6), backend_of("float32")
    caches, entries = caches_of(backend), (rows_of(rng, 128), rows_of(rng, 16), rows_of(rng, 32))
    before = content(caches)
    with pytest.raises(ValueError, match=f"entries: expected {expected} parts on layer {layer_id}, got {num_parts}"):
        backend.write_entries(entries[:num_parts], layer_id=layer_id, step=STEP, caches=caches)
    for key, unwritten in content(caches).items():
        assert_same(unwritten, before[key], str(key))


@pytest.mark.parametrize(
    ("layer_id", "num_parts", "message"),
    [(1, 2, "entries: expected 3 parts on layer 1, got 2"), (2, 3, "caches: layer 2 has no index cache")],
)
def test_a_layer_that_cannot_select_is_refused_before_anything_is_written(
    layer_id: int, num_parts: int, message: str
) -> None:
    rng, backend = np.random.default_rng(7), backend_of("float32")
    caches, entries = caches_of(backend), (rows_of(rng, 128), rows_of(rng, 16), rows_of(rng, 32))
    before, index_query = content(caches), (rows_of(rng, 4, 32), rows_of(rng, 4))
    with pytest.raises(ValueError, match=message):
        backend.write_and_quantise(entries[:num_parts], index_query, layer_id=layer_id, step=STEP, caches=caches)
    for key, unwritten in content(caches).items():
        assert_same(unwritten, before[key], str(key))
