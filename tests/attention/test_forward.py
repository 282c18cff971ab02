"""Backends' forward over a paged cache, against dense attention in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import paddle
import pytest

from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.attention.gqa import GQAAttentionBackend
from fastdeploy_dsa.attention.mla import MLAAttentionBackend, whole_context
from fastdeploy_dsa.index_schedule import IndexSchedule
from fastdeploy_dsa.row_invariance import ROW_MULTIPLE
from fastdeploy_dsa.step import StepMetadata

BLOCK_SIZE = 4
SCALE = 0.3
TABLE = np.array([[5, 1, 7, -1], [2, 6, 3, 0]], np.int32)
LENGTHS = (9, 13)
FIRST_STEP = (6, 1)  # tokens of each request in the first of two steps


def step_of(ranges: list[tuple[int, int]], table: npt.NDArray[np.int32] = TABLE) -> StepMetadata:
    positions = np.concatenate([np.arange(start, end) for start, end in ranges]).astype(np.int32)
    requests = np.concatenate([np.full(end - start, request) for request, (start, end) in enumerate(ranges)])
    return StepMetadata.build(
        token_ids=np.zeros(len(positions), np.int64),
        positions=positions,
        request_ids=requests.astype(np.int32),
        block_table=table,
        block_size=BLOCK_SIZE,
    )


def padded(rows: npt.NDArray[np.float64], step: StepMetadata) -> paddle.Tensor:
    fill = np.full((step.num_rows - len(rows), *rows.shape[1:]), np.nan)  # padding may hold anything
    return paddle.to_tensor(np.concatenate([rows, fill]).astype(np.float32))


def dense(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal attention of one request: [T, H, D], [T, H, D], [T, H, V]."""
    logits = SCALE * np.einsum("thd,shd->hts", query, keys)
    logits = np.where(np.tri(len(query), dtype=bool)[None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hts,shv->thv", weights / weights.sum(-1, keepdims=True), values)


def float32_bound(depth: int, *norms: float) -> float:
    """Rounding of sums of `depth` products, twice (logits, values), relative to the norms involved."""
    return float(4 * depth * np.finfo(np.float32).eps * np.prod(norms))


def run_in_two_steps(backend: object, parts: list[list[np.ndarray]], queries: list[np.ndarray]) -> list[np.ndarray]:
    """Serve both requests together, the first FIRST_STEP tokens in one step and the rest in another."""
    created = backend.create_kv_cache(num_layers=1, num_blocks=9)  # type: ignore[attr-defined]
    caches = {key: paddle.full(tensor.shape, float("nan")) for key, tensor in created.items()}
    outputs: list[list[np.ndarray]] = [[], []]
    for bounds in ([(0, n) for n in FIRST_STEP], list(zip(FIRST_STEP, LENGTHS, strict=True))):
        step = step_of(bounds)
        rows = [
            np.concatenate([part[start:end] for part, (start, end) in zip(kind, bounds, strict=True)])
            for kind in parts
        ]
        query = np.concatenate([q[start:end] for q, (start, end) in zip(queries, bounds, strict=True)])
        out = backend.forward(  # type: ignore[attr-defined]
            padded(query, step), tuple(padded(part, step) for part in rows), layer_id=0, step=step, caches=caches
        ).numpy()
        split = bounds[0][1] - bounds[0][0]
        outputs[0].append(out[:split])
        outputs[1].append(out[split : step.num_tokens])
    return [np.concatenate(parts) for parts in outputs]


def test_gqa_attends_causally_over_a_shuffled_block_table() -> None:
    rng = np.random.default_rng(7)
    backend = GQAAttentionBackend(num_heads=6, kv_num_heads=2, head_dim=8, softmax_scale=SCALE, block_size=BLOCK_SIZE)
    queries = [rng.standard_normal((n, 6, 8)) for n in LENGTHS]
    keys, values = ([rng.standard_normal((n, 2, 8)) for n in LENGTHS] for _ in range(2))
    outputs = run_in_two_steps(backend, [keys, values], queries)
    for request, out in enumerate(outputs):
        expected = dense(queries[request], np.repeat(keys[request], 3, axis=1), np.repeat(values[request], 3, axis=1))
        assert np.abs(out - expected).max() <= float32_bound(
            21, np.abs(values[request]).max(), np.abs(queries[request]).max()
        )


def test_mla_attends_to_its_whole_context() -> None:
    rng = np.random.default_rng(8)
    backend = MLAAttentionBackend(
        kv_lora_rank=12, qk_rope_head_dim=4, softmax_scale=SCALE, cache_format="float32", block_size=BLOCK_SIZE
    )
    queries = [rng.standard_normal((n, 3, 16)) for n in LENGTHS]
    latents, ropes = [rng.standard_normal((n, 12)) for n in LENGTHS], [rng.standard_normal((n, 4)) for n in LENGTHS]
    outputs = run_in_two_steps(backend, [latents, ropes], queries)
    for request, out in enumerate(outputs):
        rows = np.concatenate([latents[request], ropes[request]], axis=1)[:, None].repeat(3, axis=1)
        expected = dense(queries[request], rows, rows[..., :12])
        assert np.abs(out - expected).max() <= float32_bound(29, np.abs(rows).max(), np.abs(queries[request]).max())


def test_whole_context_lists_every_visible_slot_in_order() -> None:
    selection = whole_context(step_of([(0, 2), (4, 6)]), BLOCK_SIZE)
    assert selection.counts.numpy().tolist() == [1, 2, 5, 6] + [0] * 4
    assert selection.slot_ids.numpy()[3].tolist() == [8, 9, 10, 11, 24, 25]
    assert selection.positions.numpy()[2].tolist() == [0, 1, 2, 3, 4, -1]


def test_dsa_refuses_to_attend_without_a_selection() -> None:
    backend = DSAAttentionBackend(
        index_head_dim=8,
        index_schedule=IndexSchedule(letters="F", dialect="default", warnings=()),
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        softmax_scale=SCALE,
        cache_format="float32",
        block_size=BLOCK_SIZE,
    )
    step = step_of([(0, 2), (0, 2)])
    with pytest.raises(ValueError, match="selection: layer 0 attends to selected tokens and got None"):
        backend.forward(
            paddle.zeros([8, 1, 16]),
            (paddle.zeros([8, 12]), paddle.zeros([8, 4])),
            layer_id=0,
            step=step,
            caches=backend.create_kv_cache(num_layers=1, num_blocks=8),
        )


def test_a_step_is_filled_up_with_rows_that_see_and_write_nothing() -> None:
    step = step_of([(0, 2), (12, 13)])
    assert step.num_rows == ROW_MULTIPLE
    assert step.num_tokens == 3
    assert step.max_length == 13
    assert step.lengths.numpy().tolist() == [1, 2, 13] + [0] * 5
    assert step.slot_mapping.numpy().tolist() == [20, 21, 0] + [-1] * 5


def test_a_position_without_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="block_table: no block for position 12 of request 0"):
        step_of([(11, 13), (0, 1)])
