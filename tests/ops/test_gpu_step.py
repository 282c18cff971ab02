"""The ops of one layer behind each other on one stream: each reads what the one before has just written.

A kernel may start while the one before still runs, so that calls with a wait in between would hide a missing wait
inside.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from tests.kit.c_api import CApi, CCpu
from tests.kit.c_cuda import CCuda
from tests.kit.cases.common import index_cache, latent_cache, numbers_as
from tests.kit.compare import assert_same
from tests.kit.poison import GuardedMemory

BLOCK_SIZE = 64
RANK, ROPE, INDEX_DIM, INDEX_HEADS = 512, 64, 128, 64


@dataclass(frozen=True)
class Step:
    """New tokens of several requests: the slots of their rows are poison until layer_write has run.

    Attributes:
        contexts: Tokens of each request, the new ones included.
        num_new: New tokens of each request.
    """

    contexts: tuple[int, ...]
    num_new: int
    num_heads: int
    topk: int

    @cache  # noqa: B019 - of a few steps that live as long as this file
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Inputs and caches; callers change copies."""
        rng = np.random.default_rng(11)
        blocks = [-(-context // BLOCK_SIZE) for context in self.contexts]
        block_table = np.full((len(blocks), max(blocks)), -1, np.int32)
        free = rng.permutation(sum(blocks)).astype(np.int32)
        for request, count in enumerate(blocks):
            block_table[request, :count], free = free[:count], free[count:]
        requests = np.repeat(np.arange(len(blocks), dtype=np.int32), self.num_new)
        drafts = np.tile(np.arange(self.num_new), len(blocks))
        lengths = np.array(self.contexts)[requests] - self.num_new + 1 + drafts
        caches = self._caches(rng, block_table)
        num_rows = len(requests)

        def bfloat16(*shape: int) -> NDArray[np.uint16]:
            return np.asarray(numbers_as(rng.standard_normal(shape).astype(np.float32), "bfloat16"), np.uint16)

        position = lengths - 1
        return caches | {
            "block_table": block_table,
            "request_ids": requests,
            "lengths": lengths.astype(np.int32),
            "slot_mapping": block_table[requests, position // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
            + position % BLOCK_SIZE,
            "latent": bfloat16(num_rows, RANK),
            "rope": bfloat16(num_rows, ROPE),
            "key": bfloat16(num_rows, INDEX_DIM),
            "index_query": bfloat16(num_rows, INDEX_HEADS, INDEX_DIM),
            "weights": rng.standard_normal((num_rows, INDEX_HEADS)).astype(np.float32),
            "query": bfloat16(num_rows, self.num_heads, RANK + ROPE),
        }

    def _caches(self, rng: np.random.Generator, block_table: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        num_blocks = int((block_table >= 0).sum())
        latent = latent_cache(num_blocks, BLOCK_SIZE, RANK, ROPE, "fp8")
        index = index_cache(num_blocks, BLOCK_SIZE, INDEX_DIM, "fp8")
        for request, context in enumerate(self.contexts):
            positions = np.arange(context - self.num_new)
            slots = reference.indexer.position_slots(positions, block_table[request], index)
            rows = rng.standard_normal((len(slots), RANK + ROPE)).astype(np.float32)
            reference.mla_cache_write(latent=rows[:, :RANK], rope=rows[:, RANK:], cache=latent, slot_mapping=slots)
            reference.index_key_write(key=rows[:, :INDEX_DIM], cache=index, slot_mapping=slots)
        return {"latent_cache": latent, "index_cache": index}


@dataclass(frozen=True)
class Recorder(CCpu):
    """Keeps the fields of calls instead of making them."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def call(self, op: str, memory: GuardedMemory, **fields: Any) -> None:
        self.calls.append((op, fields))


def calls_of(implementation: CApi, step: Step) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, NDArray[Any]]]:
    """The calls of a step, over arrays of their own, and all that they make and change."""
    recorder = Recorder(implementation.library)
    arrays = {name: array.copy() for name, array in step.arrays().items()}
    paging = {name: arrays[name] for name in ("block_table", "request_ids", "lengths")}
    quantized, folded_weights = recorder.layer_write(
        **{name: arrays[name] for name in ("latent", "rope", "latent_cache", "key", "index_cache", "weights")},
        query=arrays["index_query"],
        slot_mapping=arrays["slot_mapping"],
        scale_format="ue8m0",
    )
    selection = recorder.index_select(
        query=quantized,
        folded_weights=folded_weights,
        index_cache=arrays["index_cache"],
        max_length=max(step.contexts),
        topk=step.topk,
        max_logits_bytes=64 << 20,
        **paging,
    )
    out, lse = recorder.sparse_mla(
        query=arrays["query"],
        latent_cache=arrays["latent_cache"],
        slot_ids=selection.slot_ids,
        counts=selection.counts,
        kv_lora_rank=RANK,
        softmax_scale=(RANK + ROPE) ** -0.5,
    )
    made = {"quantized": quantized, "folded_weights": folded_weights, **selection._asdict(), "out": out, "lse": lse}
    return recorder.calls, made | {name: arrays[name] for name in ("latent_cache", "index_cache")}


STEPS = [
    Step(contexts=(700, 65, 300, 1, 129), num_new=1, num_heads=128, topk=256),
    Step(contexts=(2500, 2100), num_new=1, num_heads=128, topk=2048),
    Step(contexts=(3000,), num_new=1, num_heads=16, topk=2048),
    Step(contexts=(400, 90), num_new=3, num_heads=64, topk=128),
    Step(contexts=(300, 260), num_new=150, num_heads=64, topk=64),
]


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("uses_graph", [False, True])
def test_a_step_without_waits_gives_the_bits_of_one_with_waits(
    c_gpu_implementation: CApi, step: Step, uses_graph: bool
) -> None:
    assert isinstance(c_gpu_implementation, CCuda)
    calls, expected = calls_of(c_gpu_implementation, step)
    for op, fields in calls:
        assert c_gpu_implementation.run_in_order([(op, fields)], GuardedMemory()) == [0], op
    assert np.all(np.isfinite(reference.decode(expected["out"])))
    implementation = replace(c_gpu_implementation, uses_graph=uses_graph)
    for _ in range(5):
        calls, actual = calls_of(implementation, step)
        assert implementation.run_in_order(calls, GuardedMemory()) == [0, 0, 0]
        for name, array in expected.items():
            assert_same(actual[name], array, name)
