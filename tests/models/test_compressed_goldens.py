"""DeepSeek-V4 against the outputs of another implementation: logits, selected entries and what lies between."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import paddle
import pytest

import fastdeploy_dsa.attention.deepseek_v4.indexer as indexer_module
from fastdeploy_dsa.engine.trace import trace
from fastdeploy_dsa.models import DeepseekV4ForCausalLM, load_model
from fastdeploy_dsa.ops import CacheFormat, IndexSelection
from tests.kit.compare import assert_close, assert_same
from tests.kit.compressed_serving import CompressedServing, ServedEntries
from tests.kit.goldens import GoldenCase
from tests.kit.serving import Plan, in_chunks, in_one_step, prompts_then_tokens

SMALL_CHUNKS = ((1, "fp8"), (3, "bfloat16"), (4, "float32"), (5, "fp8"))  # many steps: one format each
LARGE_CHUNKS = (127, 128, 129)
FORMATS: tuple[CacheFormat, ...] = ("float32", "bfloat16", "fp8")
MOST_MOVED = {"bfloat16": 0.11, "fp8": 0.75}
"""Logits that rounding caches may move with the stored selections forced; their standard deviation is 2.

bfloat16: what the cases say of computing everything in bfloat16. fp8: four times the most that they say of an e4m3
cache, for theirs rounds index keys or rows, not both.
"""


@cache
def model_of(folder: Path) -> DeepseekV4ForCausalLM:
    model = load_model(folder)
    assert isinstance(model, DeepseekV4ForCausalLM)
    return model


def plan_of(golden: GoldenCase, name: str) -> Plan:
    lengths = [len(prompt.fed_ids) for prompt in golden.prompts]
    if name == "prompts then tokens":
        return prompts_then_tokens([len(prompt.prompt_ids) for prompt in golden.prompts], lengths)
    return in_one_step(lengths) if name == "one step" else in_chunks(lengths, int(name))


@cache  # a few small arrays per case
def serve(golden: GoldenCase, plan: str, cache_format: CacheFormat = "float32") -> list[ServedEntries]:
    """All prompts of the case as one batch."""
    sequences = [prompt.fed_ids for prompt in golden.prompts]
    serving = CompressedServing(model_of(golden.folder), sequences, cache_format=cache_format)
    return serving.run_recorded(plan_of(golden, plan))


@pytest.mark.parametrize("plan", ["prompts then tokens", "one step", "5", "128"])
def test_steps_of_any_kind_give_logits_sets_and_tokens_of_the_golden(compressed_golden: GoldenCase, plan: str) -> None:
    for prompt, served in zip(compressed_golden.prompts, serve(compressed_golden, plan), strict=True):
        prompt.assert_logits(served.logits, compressed_golden.tolerances.logits)
        assert_same(served.logits[prompt.last :].argmax(-1), prompt.decode_ids, "decode ids")
        assert sorted(served.positions) == sorted(prompt.by_layer("topk"))
        for layer, positions in served.positions.items():
            assert_same(positions, prompt.by_layer("topk")[layer], f"selected sets of layer {layer}")


def test_intermediate_results_of_the_last_prompt_position_are_the_golden_ones(compressed_golden: GoldenCase) -> None:
    tolerances = compressed_golden.tolerances
    for prompt, served in zip(compressed_golden.prompts, serve(compressed_golden, "prompts then tokens"), strict=True):
        for layer, expected in prompt.by_layer("index_scores").items():
            row = served.index_scores[layer][prompt.last, : len(expected)]
            assert_close(row, expected, np.full(row.shape, tolerances.index_scores), f"index scores of layer {layer}")
        for name in ("attn_heads", "attn_out"):
            expected_by_layer = prompt.by_layer(name)
            assert sorted(expected_by_layer) == sorted(getattr(served, name))
            for layer, expected in expected_by_layer.items():
                got = getattr(served, name)[layer][prompt.last]
                assert_close(got, expected, np.full(got.shape, tolerances.attention), f"{name} of layer {layer}")


@pytest.mark.parametrize(
    ("chunk", "cache_format"), [*SMALL_CHUNKS, *((chunk, name) for chunk in LARGE_CHUNKS for name in FORMATS)]
)
def test_results_are_the_same_bits_whatever_the_chunk(
    compressed_golden: GoldenCase, chunk: int, cache_format: CacheFormat
) -> None:
    whole, chunked = (serve(compressed_golden, plan, cache_format) for plan in ("one step", str(chunk)))
    for expected, got in zip(whole, chunked, strict=True):
        assert_same(got.logits, expected.logits, "logits")
        for layer, positions in expected.positions.items():
            assert_same(got.positions[layer], positions, f"selected sets of layer {layer}")


@pytest.mark.parametrize("cache_format", ["bfloat16", "fp8"])
def test_a_rounding_cache_moves_logits_little_and_keeps_most_sets(
    compressed_golden: GoldenCase, cache_format: CacheFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the stored selections forced, for an fp8 index cache may select otherwise."""
    (prompt,) = compressed_golden.prompts
    stored = prompt.by_layer("topk")
    (served,) = serve(compressed_golden, "one step", cache_format)
    for layer, positions in served.positions.items():
        same = (positions == stored[layer]).all(axis=1).mean()
        assert same >= (0.99 if cache_format == "bfloat16" else 0.9), f"layer {layer}: {same:.1%} of the sets"

    remaining = iter([stored[layer] for layer in sorted(stored)])
    serving = CompressedServing(model_of(compressed_golden.folder), [prompt.fed_ids], cache_format=cache_format)
    monkeypatch.setattr(
        indexer_module, "index_select", lambda **given: forced(next(remaining), given, serving.block_size // 4)
    )
    (logits,) = serving.run(in_one_step([len(prompt.fed_ids)]))
    moved = float(np.abs(logits[prompt.stored] - prompt.logits).max())
    assert 0 < moved <= MOST_MOVED[cache_format], f"moved {moved:.3g}"


def forced(positions: np.ndarray, given: dict, block_entries: int) -> IndexSelection:
    """Stored entry numbers as the selection of a step of one request, with rows of padding behind."""
    num_rows = len(given["query"])
    rows = np.full((num_rows, positions.shape[1]), -1, np.int32)
    rows[: len(positions)] = positions
    blocks = given["block_table"].numpy()[0, np.maximum(rows, 0) // block_entries]
    slots = np.where(rows >= 0, blocks * block_entries + rows % block_entries, -1).astype(np.int32)
    counts = (rows >= 0).sum(axis=1).astype(np.int32)
    return IndexSelection(*(paddle.to_tensor(array) for array in (rows, slots, counts)))


def test_two_requests_in_one_batch_do_not_disturb_each_other(compressed_golden: GoldenCase) -> None:
    (prompt,) = compressed_golden.prompts
    sequences = [prompt.fed_ids, prompt.fed_ids[: len(prompt.prompt_ids) // 2]]
    serving = CompressedServing(model_of(compressed_golden.folder), sequences)
    logits = serving.run(in_chunks([len(sequence) for sequence in sequences], 37))
    (alone,) = serve(compressed_golden, "one step")
    for sequence, rows in zip(sequences, logits, strict=True):
        assert_same(rows, alone.logits[: len(sequence)], "logits")


def test_logits_command_gives_the_golden(compressed_golden: GoldenCase) -> None:
    for prompt in compressed_golden.prompts:
        steps = len(prompt.decode_ids) - 1
        traced = trace(
            compressed_golden.folder, prompt.prompt_ids.tolist(), cache_dtype="float32", chunk_size=100, steps=steps
        )
        logits = np.concatenate([traced.logits_prompt, traced.logits_decode])
        prompt.assert_logits(logits, compressed_golden.tolerances.logits)
        assert_same(traced.decode_ids, prompt.decode_ids, "decode ids")


def test_softmax_scale_is_the_golden_one(compressed_golden: GoldenCase) -> None:
    scale = model_of(compressed_golden.folder).config.softmax_scale
    assert scale == pytest.approx(compressed_golden.softmax_scale, rel=1e-15)
