"""A request's tokens do not depend on how and beside what it is computed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.cache_layout import CACHE_FORMATS
from tests.kit.tiny_model import INDEX_TOPK, VOCAB_SIZE

NUM_TOKENS = 12
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
RANDOM = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, top_p=0.95, seed=5, ignore_eos=True)
# The long ones see over five times as many tokens as they select; the short ones begin with fewer.
LENGTHS = (61, 5 * INDEX_TOPK + 3, 7, 1)
PROMPTS = [np.random.default_rng(length).integers(0, VOCAB_SIZE, length).tolist() for length in LENGTHS]

pytestmark = pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)


@cache
def reference(model: Path, cache_dtype: str, params: SamplingParams = GREEDY) -> list[list[int]]:
    """All prompts together, each in one step."""
    return tokens(LLM(model, cache_dtype=cache_dtype, num_threads=1), params=params)


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunk_size(tiny_model: Path, cache_dtype: str, chunk_size: int) -> None:
    llm = LLM(tiny_model, cache_dtype=cache_dtype, max_num_batched_tokens=chunk_size, num_threads=1)
    assert tokens(llm) == reference(tiny_model, cache_dtype)


@pytest.mark.parametrize("params", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_company(tiny_model: Path, cache_dtype: str, params: SamplingParams) -> None:
    llm = LLM(tiny_model, cache_dtype=cache_dtype, num_threads=1)
    expected = reference(tiny_model, cache_dtype, params)
    assert [tokens(llm, [prompt], params)[0] for prompt in PROMPTS] == expected
    assert tokens(llm, PROMPTS[::-1], params)[::-1] == expected
    assert tokens(llm, PROMPTS * 3, params) == expected * 3


def test_arrival_in_the_middle_of_other_requests(tiny_model: Path, cache_dtype: str) -> None:
    llm = LLM(tiny_model, cache_dtype=cache_dtype, num_threads=1, max_num_batched_tokens=16)
    received: dict[int, list[int]] = {}
    for delta in llm.stream(PROMPTS[:2], GREEDY):
        received.setdefault(delta.index, []).extend(delta.token_ids)
        if len(received[delta.index]) == 3:
            assert tokens(llm, PROMPTS[2:]) == reference(tiny_model, cache_dtype)[2:]
    assert [received[0], received[1]] == reference(tiny_model, cache_dtype)[:2]


def test_preemption(tiny_model: Path, cache_dtype: str) -> None:
    llm = LLM(tiny_model, cache_dtype=cache_dtype, block_size=8, num_blocks=15, num_threads=1)
    outputs = llm.generate(PROMPTS, GREEDY)
    assert sum(output.num_preemptions for output in outputs) > 0
    assert [output.token_ids for output in outputs] == reference(tiny_model, cache_dtype)


@pytest.mark.parametrize("options", [{"num_threads": 2}, {"block_size": 8}, {"block_size": 128}], ids=str)
def test_threads_and_block_size(tiny_model: Path, cache_dtype: str, options: dict[str, Any]) -> None:
    llm = LLM(tiny_model, cache_dtype=cache_dtype, **({"num_threads": 1} | options))
    assert tokens(llm) == reference(tiny_model, cache_dtype)


def test_the_prompts_are_long_enough_for_the_selection_to_matter(tiny_model: Path, cache_dtype: str) -> None:
    dense = LLM(tiny_model, cache_dtype=cache_dtype, num_threads=1, hf_overrides={"index_topk": 128})
    differs = [one != other for one, other in zip(tokens(dense), reference(tiny_model, cache_dtype), strict=True)]
    assert differs[:2] == [True, True]
