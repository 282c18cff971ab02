"""The guarantees on the model that comes with the package, at its real sizes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.cache_layout import CACHE_FORMATS
from fastdeploy_dsa.installation import DEMO_MODEL

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SENTENCE = "The cache keeps one row per token, and every row is read by its own slot. "
PROMPTS = ["A block is", SENTENCE * 5, "What is the use of an indexer? " + SENTENCE * 2]


def texts(prompts: list[str], **options: Any) -> list[tuple[list[int], str]]:
    llm = LLM(DEMO_MODEL, **({"num_threads": 1, "cache_memory": "128MiB"} | options))
    return [(output.token_ids, output.text) for output in llm.generate(prompts, GREEDY)]


@cache
def reference(cache_dtype: str) -> list[tuple[list[int], str]]:
    return texts(PROMPTS, cache_dtype=cache_dtype)


@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
@pytest.mark.parametrize(
    "options",
    [{"max_num_batched_tokens": 7}, {"max_num_batched_tokens": 64}, {"block_size": 16}, {"num_threads": 2}],
    ids=str,
)
def test_tokens_do_not_depend_on(cache_dtype: str, options: dict[str, Any]) -> None:
    assert texts(PROMPTS, cache_dtype=cache_dtype, **options) == reference(cache_dtype)


def test_a_prompt_alone_gives_what_it_gives_in_company() -> None:
    for prompt, expected in zip(PROMPTS, reference("fp8"), strict=True):
        assert texts([prompt], cache_dtype="fp8") == [expected]


def test_one_token_at_a_time_gives_what_one_step_gives() -> None:
    assert texts(PROMPTS[::2], max_num_batched_tokens=1) == reference("float32")[::2]


def test_preemption_changes_nothing() -> None:
    lengths = [len(tokens) for tokens, _ in reference("fp8")]
    llm = LLM(DEMO_MODEL, num_threads=1, cache_dtype="fp8", block_size=4, num_blocks=144)
    outputs = llm.generate(PROMPTS, GREEDY)
    assert sum(output.num_preemptions for output in outputs) > 0
    assert lengths == [GREEDY.max_tokens] * len(PROMPTS)
    assert [(output.token_ids, output.text) for output in outputs] == reference("fp8")


@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
@pytest.mark.parametrize(
    ("num_drafts", "options"),
    [
        (1, {}),
        (2, {"max_num_batched_tokens": 9, "max_num_seqs": 2}),
        (3, {"block_size": 16}),
        (3, {"block_size": 4, "num_blocks": 148}),
        (4, {"hf_overrides": {"index_share_for_mtp_iteration": True}}),
        (3, {"block_size": 4, "num_blocks": 148, "swap_space": "64MiB"}),
    ],
    ids=str,
)
def test_drafts_of_the_shipped_layer_change_no_token_and_are_mostly_right(
    cache_dtype: str, num_drafts: int, options: dict[str, Any]
) -> None:
    config = {"method": "mtp", "num_speculative_tokens": num_drafts}
    given = {"num_threads": 1, "cache_memory": "128MiB", "cache_dtype": cache_dtype, "speculative_config": config}
    llm = LLM(DEMO_MODEL, **(given | options))
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [(output.token_ids, output.text) for output in outputs] == reference(cache_dtype)
    stats = llm.speculative_stats()
    assert stats.tokens_per_round > 1.0 + 0.5 * min(num_drafts, 2)
    assert stats.acceptance_by_position[0] > 0.6
    assert (sum(output.num_preemptions for output in outputs) > 0) == ("num_blocks" in options)


def test_the_long_prompt_is_over_five_times_what_a_row_selects() -> None:
    llm = LLM(DEMO_MODEL, num_threads=1, cache_memory="128MiB")
    output = llm.generate(PROMPTS[1], SamplingParams(max_tokens=1))[0]
    assert len(output.prompt_token_ids) > 5 * llm.config.index_topk


def test_the_model_writes_text() -> None:
    for _, text in reference("float32"):
        assert text.isascii()
        assert sum(character.isalpha() or character == " " for character in text) > len(text) / 2
