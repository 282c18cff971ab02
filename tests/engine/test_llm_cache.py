"""The cache changes how much is computed, and never a token."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cache_manager import PlainAllocator
from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.block_copier import PaddleBlockCopier
from fastdeploy_dsa.cache_layout import CACHE_FORMATS
from fastdeploy_dsa.engine import EngineCacheStats
from fastdeploy_dsa.engine.sampler import NonFiniteLogitsError
from tests.kit.tiny_model import INDEX_TOPK, VOCAB_SIZE, write_tiny_model

NUM_TOKENS = 20
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)
BLOCK_SIZE = 8
SHARED = np.random.default_rng(3).integers(0, VOCAB_SIZE, 5 * INDEX_TOPK).tolist()
# Alone, with a beginning in common that is longer than a selection, and extending each other.
PROMPTS = [[7], SHARED, [*SHARED, 1, 2, 3], [*SHARED, 4], [*SHARED, 1, 2, 3, 4, 5, 6, 7, 8, 9], SHARED[1:]]
ROOMY: dict[str, Any] = {"num_blocks": 60}
# The largest request needs 9 blocks.
TIGHT: dict[str, Any] = {"num_blocks": 11}
# Without shared blocks two of the long ones need more.
UNSHARED: dict[str, Any] = {"num_blocks": 13, "enable_prefix_caching": False}


def make_llm(model: Path, **options: Any) -> LLM:
    return LLM(model, **({"num_threads": 1, "block_size": BLOCK_SIZE, "check_integrity": True} | options))


def generate(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[tuple[list[int], Any]]:
    """Tokens and log-probabilities; afterwards nothing is owned."""
    results = [(output.token_ids, output.logprobs) for output in llm.generate(prompts, GREEDY)]
    check_idle(llm)
    return results


def check_idle(llm: LLM) -> None:
    llm._cache.drain()
    llm._core.scheduler.check_integrity()
    stats = llm.cache_stats().cache
    assert (stats.num_tables, stats.device.num_owned, stats.host.num_owned) == (0, 0, 0)


@cache
def reference(model: Path, cache_dtype: str) -> list[tuple[list[int], Any]]:
    """Each prompt alone, without any cache beyond its own."""
    llm = make_llm(model, cache_dtype=cache_dtype, enable_prefix_caching=False, **ROOMY)
    return [generate(llm, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
@pytest.mark.parametrize(
    "options",
    [
        ROOMY,
        ROOMY | {"max_num_batched_tokens": 7},
        TIGHT | {"max_num_batched_tokens": 64},
        TIGHT | {"swap_space": "4MiB", "max_num_batched_tokens": 16},
        UNSHARED | {"swap_space": "4MiB", "max_num_batched_tokens": 7},
        TIGHT | {"swap_space": 100_000, "max_num_batched_tokens": 64},
    ],
    ids=str,
)
def test_tokens_and_logprobs_do_not_depend_on_the_cache(
    tiny_model: Path, cache_dtype: str, options: dict[str, Any]
) -> None:
    llm = make_llm(tiny_model, cache_dtype=cache_dtype, **options)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        order = 1 if prompts is PROMPTS else -1
        assert generate(llm, prompts) == reference(tiny_model, cache_dtype)[::order]
    check_sums(llm.cache_stats(), PROMPTS * 2, options)


def check_sums(stats: EngineCacheStats, prompts: list[list[int]], options: dict[str, Any]) -> None:
    """Every token of every request was found, loaded or computed."""
    cache, scheduler = stats.cache, stats.scheduler
    num_tokens = sum(map(len, prompts)) + len(prompts) * (NUM_TOKENS - 1)
    num_hits = cache.num_device_hit_tokens + cache.num_host_hit_tokens
    recomputed = scheduler.num_preemptions - scheduler.num_swap_outs
    if recomputed == 0 and scheduler.num_failed_loads == 0:
        assert cache.num_queried_tokens == sum(map(len, prompts))
        assert scheduler.num_computed_tokens == num_tokens - num_hits
    assert scheduler.num_computed_tokens + num_hits >= num_tokens
    assert (num_hits > 0) == options.get("enable_prefix_caching", True)
    assert (scheduler.num_preemptions > 0) == (options["num_blocks"] != ROOMY["num_blocks"])
    assert cache.device.num_free + cache.device.num_evictable == options["num_blocks"]
    assert (sum(cache.bytes_moved[key] for key in ("device_to_host", "host_to_device")) > 0) == (
        "swap_space" in options
    )


@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
def test_everything_swaps_in_a_small_cache(tiny_model: Path, cache_dtype: str) -> None:
    llm = make_llm(tiny_model, cache_dtype=cache_dtype, swap_space="4MiB", enable_prefix_caching=False, **TIGHT)
    short = [prompt[:15] for prompt in PROMPTS]
    alone = [generate(llm, [prompt])[0] for prompt in short]
    assert generate(llm, short) == alone
    counts = llm.cache_stats().scheduler
    assert counts.num_swap_outs == counts.num_preemptions > 1
    assert counts.num_computed_tokens == 2 * sum(len(prompt) + NUM_TOKENS - 1 for prompt in short)


@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
def test_without_host_memory_the_engine_runs_on_and_says_so_once(
    tiny_model: Path, cache_dtype: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_self: PlainAllocator, num_bytes: int) -> None:
        raise MemoryError(f"no {num_bytes} bytes")

    monkeypatch.setattr(PlainAllocator, "allocate", fails)
    with caplog.at_level(logging.WARNING, "fastdeploy_dsa"):
        llm = make_llm(tiny_model, cache_dtype=cache_dtype, swap_space="4MiB", **TIGHT)
    (record,) = caplog.records
    assert record.message.startswith("the host tier of ")
    assert record.message.endswith("going on without swap_space")
    assert generate(llm) == reference(tiny_model, cache_dtype)
    stats = llm.cache_stats()
    assert stats.scheduler.num_preemptions > stats.scheduler.num_swap_outs == 0
    assert (stats.cache.host.num_free, stats.cache.host.num_evictable) == (0, 0)


@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
@pytest.mark.parametrize("options", [TIGHT, UNSHARED], ids=["cached", "not cached"])
def test_failing_copies_cost_time_and_no_token(
    tiny_model: Path, cache_dtype: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, num_copies = PaddleBlockCopier.copy, 0

    def sometimes_fails(self: PaddleBlockCopier, **arguments: Any) -> None:
        nonlocal num_copies
        num_copies += 1
        if num_copies % 8 == 0:
            raise OSError("injected failure")
        copy(self, **arguments)

    monkeypatch.setattr(PaddleBlockCopier, "copy", sometimes_fails)
    llm = make_llm(tiny_model, cache_dtype=cache_dtype, swap_space="4MiB", **options)
    for _ in range(2):
        assert generate(llm) == reference(tiny_model, cache_dtype)
    stats = llm.cache_stats()
    assert stats.num_failed_copies > 0
    assert f"failed copies  {stats.num_failed_copies}\n" in stats.table()


def test_a_prompt_seen_before_costs_one_computed_token(tiny_model: Path) -> None:
    llm = make_llm(tiny_model, **ROOMY)
    one = SamplingParams(max_tokens=1, temperature=0.0)
    before = llm.cache_stats().scheduler.num_computed_tokens
    for expected in (len(SHARED), 1, 1):
        llm.generate([SHARED], one)
        after = llm.cache_stats().scheduler.num_computed_tokens
        assert after - before == expected
        before = after
    assert llm.cache_stats().cache.hit_rate == pytest.approx(2 * (len(SHARED) - 1) / (3 * len(SHARED)))


def test_prompts_with_a_common_beginning_compute_it_once(tiny_model: Path) -> None:
    llm = make_llm(tiny_model, **ROOMY)
    llm.generate([[*SHARED, 1], [*SHARED, 2], [*SHARED, 3]], SamplingParams(max_tokens=1, temperature=0.0))
    assert llm.cache_stats().scheduler.num_computed_tokens == len(SHARED) + 3


def test_a_dialogue_computes_only_what_is_new(tiny_model: Path) -> None:
    llm, prompt = make_llm(tiny_model, **ROOMY), list(SHARED)
    for _ in range(3):
        before = llm.cache_stats()
        tokens = llm.generate([prompt], GREEDY)[0].token_ids
        after = llm.cache_stats()
        hits = after.cache.num_device_hit_tokens - before.cache.num_device_hit_tokens
        computed = after.scheduler.num_computed_tokens - before.scheduler.num_computed_tokens
        assert hits + computed == len(prompt) + NUM_TOKENS - 1
        assert before.cache.num_queried_tokens == 0 or computed <= NUM_TOKENS + 3 + BLOCK_SIZE
        prompt += [*tokens, 1, 2, 3]


def test_abandoned_streams_and_failed_requests_leave_no_block_behind(tiny_model: Path, tmp_path: Path) -> None:
    llm = make_llm(tiny_model, swap_space="4MiB", **TIGHT)
    for num_deltas in (1, 9, 20):
        stream = llm.stream(PROMPTS, GREEDY)
        for _ in range(num_deltas):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        check_idle(llm)
    assert generate(llm) == reference(tiny_model, "float32")

    folder = write_tiny_model(tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = np.full_like(weights["lm_head.weight"], 3e38)
    save_file(weights, folder / "model.safetensors")
    llm = make_llm(folder, **ROOMY)
    with pytest.raises(NonFiniteLogitsError):
        llm.generate(PROMPTS, GREEDY)
    check_idle(llm)


def test_the_model_waits_for_a_layer_before_it_touches_the_layers_cache(tiny_model: Path) -> None:
    events: list[int | tuple[str, int]] = []

    class Watched(dict[tuple[str, int], Any]):
        def __getitem__(self, key: tuple[str, int]) -> Any:
            events.append(key)
            return super().__getitem__(key)

    llm = make_llm(tiny_model, **ROOMY)
    llm._core._runner._caches = Watched(llm._core._runner._caches)  # type: ignore[attr-defined]
    llm._cache.wait_for_layer = events.append  # type: ignore[method-assign,assignment]
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
    waits = [event for event in events if isinstance(event, int)]
    assert waits == list(range(llm.config.num_hidden_layers))
    for place, event in enumerate(events):
        if isinstance(event, tuple):
            assert event[1] in events[:place], f"{event} before the wait for its layer"
    assert {event for event in events if isinstance(event, tuple)} == set(llm._core._runner._caches)  # type: ignore[attr-defined]
