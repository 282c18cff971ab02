"""A request of DeepSeek-V4 has the same tokens and logprobs, bit for bit, however and beside what it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.cache_layout import CACHE_FORMATS
from tests.engine.test_mtp_guarantees import ScriptedRunner, at_times
from tests.kit.tiny_compressed_model import VOCAB_SIZE, write_tiny_compressed_model

NUM_TOKENS = 20
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=3)
# The long ones cross windows of 128 tokens while decoding, one of them in the middle of a prefill block, too.
LENGTHS = (375, 250, 118, 61, 3, 1)
PROMPTS = [np.random.default_rng(length).integers(0, VOCAB_SIZE, length).tolist() for length in LENGTHS]
FEW_BLOCKS = {"block_size": 128, "num_blocks": 5, "max_model_len": 512}

Outputs = list[tuple[list[int], Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_compressed_model(tmp_path_factory.mktemp("compressed") / "model", num_nextn_predict_layers=1)


def make_llm(model: Path, num_drafts: int = 0, **options: Any) -> LLM:
    drafting = {"method": "mtp", "num_speculative_tokens": num_drafts, "adaptive": False}
    speculative = {"speculative_config": drafting} if num_drafts else {}
    return LLM(model, **({"num_threads": 1, "check_integrity": True, "max_model_len": 512} | speculative | options))


def outputs(llm: LLM, prompts: Sequence[list[int]] = PROMPTS, params: Any = GREEDY) -> Outputs:
    return [(output.token_ids, output.logprobs) for output in llm.generate(prompts, params)]


@cache
def reference(model: Path, cache_dtype: str = "float32") -> Outputs:
    """Every prompt alone, in one step."""
    llm = make_llm(model, cache_dtype=cache_dtype, enable_prefix_caching=False)
    return [outputs(llm, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("chunk_size", "cache_dtype"),
    [
        (1, "fp8"),
        (3, "bfloat16"),
        (4, "float32"),
        (5, "fp8"),
        *((size, name) for size in (127, 128, 129) for name in CACHE_FORMATS),
    ],
)
def test_chunk_size(model: Path, cache_dtype: str, chunk_size: int) -> None:
    places = slice(0 if chunk_size > 100 else 1, None)  # small chunks are many steps
    llm = make_llm(model, cache_dtype=cache_dtype, max_num_batched_tokens=chunk_size)
    assert outputs(llm, PROMPTS[places]) == reference(model, cache_dtype)[places]


@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
def test_company_order_and_threads(model: Path, cache_dtype: str) -> None:
    llm = make_llm(model, cache_dtype=cache_dtype, num_threads=2)
    assert outputs(llm) == reference(model, cache_dtype)
    assert outputs(llm, PROMPTS[::-1]) == reference(model, cache_dtype)[::-1]


@pytest.mark.parametrize("block_size", [128, 512])
def test_block_size(model: Path, block_size: int) -> None:
    assert outputs(make_llm(model, block_size=block_size)) == reference(model)


@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
@pytest.mark.parametrize("swap_space", [0, "64MiB"])
def test_preemption_by_recomputing_and_by_swapping(model: Path, cache_dtype: str, swap_space: int | str) -> None:
    llm = make_llm(model, cache_dtype=cache_dtype, swap_space=swap_space, **FEW_BLOCKS)
    order = [1, 0, 2, 3]
    got = llm.generate([PROMPTS[place] for place in order], GREEDY)
    assert [(output.token_ids, output.logprobs) for output in got] == [
        reference(model, cache_dtype)[place] for place in order
    ]
    assert sum(output.num_preemptions for output in got) > 0


@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
@pytest.mark.parametrize("shared", [256, 300, 375])
def test_a_prefix_hit_resumes_between_compression_windows(model: Path, cache_dtype: str, shared: int) -> None:
    """A hit ends at 256: windows of 12 tokens and the older half of the next entry reach across that boundary."""
    llm = make_llm(model, cache_dtype=cache_dtype)
    outputs(llm, [PROMPTS[0]])
    before = llm.cache_stats().cache.num_device_hit_tokens
    rng = np.random.default_rng(shared)
    prompt = PROMPTS[0][:shared] + rng.integers(0, VOCAB_SIZE, 130).tolist()
    cached = outputs(llm, [prompt])
    assert llm.cache_stats().cache.num_device_hit_tokens - before == 256
    assert cached == outputs(make_llm(model, cache_dtype=cache_dtype, enable_prefix_caching=False), [prompt])


def test_a_prefix_that_went_to_the_host_comes_back(model: Path) -> None:
    llm = make_llm(model, swap_space="64MiB", **FEW_BLOCKS)
    for prompt in (PROMPTS[0], PROMPTS[1][::-1], PROMPTS[0][::-1], PROMPTS[0]):
        got = outputs(llm, [prompt])
    assert got == reference(model)[:1]
    assert llm.cache_stats().cache.num_host_hit_tokens > 0


def sequences_of(model: Path, cache_dtype: str) -> list[list[int]]:
    """Prompts with what follows, for drafts that are right."""
    return [
        [*prompt, *tokens, *[0] * 6]
        for prompt, (tokens, _) in zip(PROMPTS, reference(model, cache_dtype), strict=True)
    ]


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["own", "right", "wrong", "at times"])
def test_tokens_are_those_without_drafts(model: Path, kind: str, num_drafts: int) -> None:
    cache_dtype = CACHE_FORMATS[num_drafts % len(CACHE_FORMATS)]
    llm = make_llm(model, num_drafts, cache_dtype=cache_dtype)
    is_right = {"right": lambda *_: True, "wrong": lambda *_: False, "at times": at_times}.get(kind)
    if is_right is not None:
        ScriptedRunner(llm, sequences_of(model, cache_dtype), is_right)
    assert outputs(llm) == reference(model, cache_dtype)
    if is_right is not None:
        low, high = {"right": (0.9, 1.0), "wrong": (0.0, 0.1), "at times": (0.2, 0.9)}[kind]
        assert low <= llm.speculative_stats().acceptance_rate <= high


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4])
def test_rejected_drafts_leave_nothing_behind_at_any_place_in_a_window(model: Path, num_drafts: int) -> None:
    """Prompts that end at every place around the boundaries of 4, 8 and 128 tokens, all drafts rejected."""
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, logprobs=3)
    prompts = [PROMPTS[1][:length] for length in range(117, 133)]
    expected = outputs(make_llm(model, enable_prefix_caching=False), prompts, params)
    llm = make_llm(model, num_drafts, enable_prefix_caching=False)
    sequences = [[*prompt, *tokens, *[0] * 6] for prompt, (tokens, _) in zip(prompts, expected, strict=True)]
    ScriptedRunner(llm, sequences, lambda *_: False)
    assert outputs(llm, prompts, params) == expected
    assert llm.speculative_stats().acceptance_rate <= 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 7, "max_num_seqs": 1},
        {"max_num_batched_tokens": 64},
        FEW_BLOCKS,
        FEW_BLOCKS | {"swap_space": "64MiB"},
        FEW_BLOCKS | {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_drafting_through_chunks_preemption_and_prefixes(model: Path, options: dict[str, Any]) -> None:
    llm = make_llm(model, 3, **options)
    ScriptedRunner(llm, sequences_of(model, "float32"), at_times)
    for prompts, order in ((PROMPTS, 1), (PROMPTS[::-1], -1)):
        assert outputs(llm, prompts) == reference(model)[::order]


@pytest.mark.parametrize("overrides", [{"sliding_window": 2}, {"index_topk": 1}], ids=str)
def test_windows_and_selections_matter_here(model: Path, overrides: dict[str, Any]) -> None:
    """Otherwise the tests above would compare little."""
    other = outputs(make_llm(model, hf_overrides=overrides))
    assert [got != expected for got, expected in zip(other, reference(model), strict=True)][:3] == [True] * 3
