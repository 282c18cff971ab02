"""Prefix hits, swapping and failures of copies under the scheduler, with a model that is only its cache.

Every step of these tests ends with the integrity check of engine and cache manager.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_manager import CacheSwapMetadata, LayerDoneCounter, TransferTimeout
from fastdeploy_dsa.engine.core import EngineCore
from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.swap_cost import ASSUMED_BYTES_PER_SECOND, SwapCost
from tests.engine.fakes import CacheModel, FaultyCopier, finish, greedy_continuation, make_core, make_request

CACHED = {"is_prefix_cached": True, "num_host_blocks": 0}
SWAPPED = {"is_prefix_cached": False, "num_host_blocks": 100}
MODES: list[dict[str, Any]] = [
    {"is_prefix_cached": False, "num_host_blocks": 0},
    CACHED,
    SWAPPED,
    {"is_prefix_cached": True, "num_host_blocks": 100},
    {"is_prefix_cached": True, "num_host_blocks": 3},
]
# step of arrival, beginning that is shared with others, its length, length of the rest, max_tokens, step of an abort
ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.integers(0, 1),
        st.integers(0, 10),
        st.integers(1, 5),
        st.integers(1, 9),
        st.one_of(st.none(), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=10,
)


def prompt_of(beginning: int, length: int, number: int, rest: int) -> list[int]:
    return [(3 + 10 * beginning + place) % 50 for place in range(length)] + [number] * rest


def run_all(core: EngineCore, requests: list[Request]) -> None:
    for request in requests:
        core.add(request)
    finish(core, *requests)


def check_tokens(*requests: Request) -> None:
    for request in requests:
        output = request.output()
        expected = greedy_continuation(output.prompt_token_ids, len(output.token_ids))
        assert output.token_ids == expected
        assert output.finish_reason == "abort" or len(expected) == request.max_tokens


def check_idle(core: EngineCore) -> None:
    """Nothing is owned any more, on either tier, and the counters agree with each other."""
    scheduler = core.scheduler
    assert scheduler.num_running == scheduler.num_waiting == 0
    core._cache.drain(20.0)
    scheduler.check_integrity()
    cache = core._cache.stats()
    assert (cache.num_tables, cache.device.num_owned, cache.host.num_owned) == (0, 0, 0)
    assert cache.num_device_hit_tokens + cache.num_host_hit_tokens <= cache.num_queried_tokens
    assert scheduler.counts.num_swap_outs + scheduler.counts.num_failed_swap_outs <= scheduler.counts.num_preemptions


def computed(model: CacheModel) -> int:
    return sum(len(inputs.token_ids) for inputs in model.steps)


@settings(max_examples=300, deadline=None)
@given(
    arrivals=ARRIVALS,
    mode=st.sampled_from(MODES),
    block_size=st.sampled_from([1, 2, 3]),
    max_num_seqs=st.integers(1, 4),
    spare_budget=st.integers(0, 9),
    spare_blocks=st.integers(0, 6),
    failing_copies=st.sets(st.integers(0, 30)),
    slow_copies=st.sets(st.integers(0, 30)),
    transfer_timeout=st.sampled_from([20.0, 0.002]),
)
def test_every_request_gets_its_own_tokens_whatever_is_shared_swapped_slow_or_fails(
    *,
    arrivals: list[tuple[int, int, int, int, int, int | None]],
    mode: dict[str, Any],
    block_size: int,
    max_num_seqs: int,
    spare_budget: int,
    spare_blocks: int,
    failing_copies: set[int],
    slow_copies: set[int],
    transfer_timeout: float,
) -> None:
    largest = max(-(-(length + rest + count - 1) // block_size) for _, _, length, rest, count, _ in arrivals)
    core, model = make_core(
        num_blocks=largest + spare_blocks,
        block_size=block_size,
        max_num_batched_tokens=max_num_seqs + spare_budget,
        max_num_seqs=max_num_seqs,
        copier=FaultyCopier(failing_copies.__contains__, slow_copies.__contains__),
        transfer_timeout=transfer_timeout,
        **mode,
    )
    arrivals = sorted(arrivals, key=lambda arrival: arrival[0])
    requests = [
        make_request(prompt_of(beginning, length, number, rest), count)
        for number, (_, beginning, length, rest, count, _) in enumerate(arrivals)
    ]
    added = 0
    for step in range(2_000):
        while added < len(requests) and arrivals[added][0] <= step:
            core.add(requests[added])
            added += 1
        for request, arrival in zip(requests[:added], arrivals, strict=False):
            if arrival[-1] is not None and arrival[-1] <= step:
                core.abort(request)
        with suppress(TransferTimeout):
            core.step()
        if added == len(requests) and all(request.finish_reason is not None for request in requests):
            break
    check_tokens(*requests)
    check_idle(core)
    assert core.scheduler.counts.num_computed_tokens == computed(model)


def test_a_prompt_seen_before_is_not_computed_but_for_its_last_token() -> None:
    core, model = make_core(num_blocks=20, block_size=2, max_num_batched_tokens=16, **CACHED)
    first, again = make_request(range(8), 1), make_request(range(8), 1)
    run_all(core, [first])
    run_all(core, [again])
    check_tokens(first, again)
    assert [len(inputs.token_ids) for inputs in model.steps] == [8, 1]
    assert core._cache.stats().num_device_hit_tokens == 7
    check_idle(core)


def test_without_prefix_caching_everything_is_computed() -> None:
    core, model = make_core(num_blocks=20, block_size=2, max_num_batched_tokens=16, is_prefix_cached=False)
    for _ in range(2):
        run_all(core, [make_request(range(8), 1)])
    assert [len(inputs.token_ids) for inputs in model.steps] == [8, 8]
    assert core._cache.stats().hit_rate == 0.0


def test_a_prompt_that_extends_an_answer_computes_only_what_is_new() -> None:
    core, model = make_core(num_blocks=30, block_size=2, max_num_batched_tokens=32, **CACHED)
    prompt, num_seen = [1, 2, 3, 4, 5], 0
    for _ in range(3):
        request = make_request(prompt, 4)
        run_all(core, [request])
        check_tokens(request)
        prompt = [*prompt, *request.output().token_ids, 7]
        # All but the last generated token were computed; whole blocks of two are cached.
        num_hits = num_seen - num_seen % 2
        assert len(model.steps[-4].token_ids) == request.num_prompt - num_hits
        num_seen = request.max_cached_tokens
    check_idle(core)


def test_requests_with_a_common_prefix_compute_it_once() -> None:
    core, model = make_core(num_blocks=60, block_size=2, max_num_batched_tokens=64, **CACHED)
    requests = [make_request([*range(12), 40 + number], 2) for number in range(4)]
    run_all(core, requests)
    check_tokens(*requests)
    assert [len(inputs.token_ids) for inputs in model.steps] == [13, 1 + 3, 3]
    assert core._cache.stats().num_device_hit_tokens == 3 * 12
    check_idle(core)


def test_requests_with_little_in_common_do_not_wait_for_each_other() -> None:
    core, model = make_core(num_blocks=60, block_size=2, max_num_batched_tokens=64, **CACHED)
    run_all(core, [make_request([1, *range(10, 20)], 1), make_request([1, *range(20, 30)], 1)])
    assert len(model.steps) == 1


def test_a_preempted_request_goes_to_the_host_and_nothing_is_computed_twice() -> None:
    core, model = make_core(num_blocks=6, block_size=2, max_num_batched_tokens=16, **SWAPPED)
    requests = [make_request([number, 8, 9], 8) for number in range(3)]
    run_all(core, requests)
    check_tokens(*requests)
    counts = core.scheduler.counts
    assert counts.num_swap_outs == counts.num_preemptions > 0
    assert computed(model) == 3 * 10, "3 prompt tokens and 7 fed ones each"
    moved = core._cache.stats().bytes_moved
    assert moved["host_to_device"] == moved["device_to_host"] > 0
    check_idle(core)


def test_a_full_host_means_computing_again() -> None:
    core, model = make_core(num_blocks=6, block_size=2, is_prefix_cached=False, num_host_blocks=1)
    requests = [make_request([number, 8, 9], 8) for number in range(3)]
    run_all(core, requests)
    check_tokens(*requests)
    counts = core.scheduler.counts
    assert counts.num_swap_outs < counts.num_preemptions
    assert computed(model) > 3 * 10
    check_idle(core)


@pytest.mark.parametrize("direction", ["out", "in"])
def test_a_failed_copy_means_computing_again(direction: str) -> None:
    # A swap copies two layers out, and later two in.
    copier = FaultyCopier(lambda number: number % 4 == (1 if direction == "out" else 3))
    core, model = make_core(num_blocks=6, block_size=2, copier=copier, **SWAPPED)
    requests = [make_request([number, 8, 9], 8) for number in range(2)]
    run_all(core, requests)
    check_tokens(*requests)
    counts = core.scheduler.counts
    assert (counts.num_failed_swap_outs if direction == "out" else counts.num_failed_loads) > 0
    assert computed(model) > 2 * 10
    check_idle(core)


def test_an_evicted_prefix_is_loaded_from_the_host() -> None:
    core, model = make_core(num_blocks=5, block_size=2, max_num_batched_tokens=16, num_host_blocks=20)
    prompts = [range(8), range(20, 28), range(8)]
    for prompt in prompts:
        run_all(core, [make_request(prompt, 1)])
    assert [len(inputs.token_ids) for inputs in model.steps][:2] == [8, 8]
    assert len(model.steps[2].token_ids) <= 2
    assert core._cache.stats().num_host_hit_tokens > 0
    check_idle(core)


def test_a_failed_load_of_a_prefix_means_computing_it() -> None:
    copier = FaultyCopier()
    core, model = make_core(num_blocks=4, block_size=2, max_num_batched_tokens=16, num_host_blocks=20, copier=copier)
    for prompt in (range(8), range(20, 28)):
        run_all(core, [make_request(prompt, 1)])
    copier.fails = lambda _: True
    request = make_request(range(8), 1)
    run_all(core, [request])
    check_tokens(request)
    assert core.scheduler.counts.num_failed_loads == 1
    assert len(model.steps[2].token_ids) == 8
    check_idle(core)


def test_a_prompt_that_is_cached_as_a_whole_runs_although_its_last_block_cannot_be_copied() -> None:
    copier = FaultyCopier()
    core, model = make_core(num_blocks=20, block_size=2, max_num_batched_tokens=16, copier=copier)
    run_all(core, [make_request(range(8), 1)])
    copier.fails = lambda _: True
    request = make_request(range(8), 3)
    run_all(core, [request])
    check_tokens(request)
    assert len(model.steps[1].token_ids) == 2
    check_idle(core)


def test_a_request_aborted_on_the_host_gives_its_blocks_back() -> None:
    core, _ = make_core(num_blocks=6, block_size=2, max_num_batched_tokens=16, **SWAPPED)
    requests = [make_request([number, 8, 9], 8) for number in range(3)]
    for request in requests:
        core.add(request)
    while core.scheduler.counts.num_swap_outs == 0:
        core.step()
    (swapped,) = (request for request in requests if request.table is not None and not request.table.is_on_device)
    core.abort(swapped)
    core.scheduler.check_integrity()
    assert core._cache.stats().host.num_owned == 0
    finish(core, *requests)
    check_tokens(*requests)
    check_idle(core)


def close_gate_at_loads(core: EngineCore, copier: FaultyCopier) -> None:
    controller = core._cache._controller
    original = controller.load_host_to_device

    def hangs(metadata: CacheSwapMetadata) -> LayerDoneCounter:
        copier.gate.clear()
        return original(metadata)

    controller.load_host_to_device = hangs  # type: ignore[method-assign]


def core_whose_load_hangs() -> tuple[EngineCore, FaultyCopier, Request]:
    """A core that has just refused to go on because a request's prefix does not arrive from the host."""
    copier = FaultyCopier()
    core, _ = make_core(num_blocks=4, block_size=2, num_host_blocks=20, copier=copier, transfer_timeout=0.1)
    for prompt in (range(8), range(20, 28)):
        run_all(core, [make_request(prompt, 1)])
    request = make_request(range(8), 1)
    core.add(request)
    close_gate_at_loads(core, copier)
    with pytest.raises(TransferTimeout, match="were not copied within"):
        core.step()
    return core, copier, request


def test_a_load_that_takes_too_long_is_an_error_and_the_request_goes_on_when_it_has_come() -> None:
    core, copier, request = core_whose_load_hangs()
    with pytest.raises(TransferTimeout, match="were not copied within"):
        core.step()
    copier.gate.set()
    finish(core, request)
    check_tokens(request)
    check_idle(core)


def test_a_load_that_hangs_keeps_its_blocks_until_it_ends_although_its_request_is_gone() -> None:
    core, copier, request = core_whose_load_hangs()
    core.abort(request)
    core.scheduler.check_integrity()
    other = make_request(range(30, 38), 1)
    core.add(other)
    with pytest.raises(TransferTimeout):
        core.step()
    core.scheduler.check_integrity()
    copier.gate.set()
    finish(core, other)
    check_tokens(other)
    check_idle(core)


@pytest.mark.parametrize("num_requests", [2, 3])
def test_a_load_that_fails_between_two_steps_means_computing_again(num_requests: int) -> None:
    copier = FaultyCopier()
    core, _ = make_core(num_blocks=6, block_size=2, copier=copier, transfer_timeout=0.1, **SWAPPED)
    requests = [make_request([number, 8, 9], 8) for number in range(num_requests)]
    for request in requests:
        core.add(request)
    close_gate_at_loads(core, copier)
    with pytest.raises(TransferTimeout, match="were not copied within"):
        finish(core, *requests)
    copier.fails = lambda _: True
    copier.gate.set()
    core._cache._controller.drain()
    finish(core, *requests)
    check_tokens(*requests)
    check_idle(core)


def test_a_copy_to_the_host_that_takes_too_long_means_computing_again() -> None:
    copier = FaultyCopier()
    core, _ = make_core(num_blocks=6, block_size=2, copier=copier, transfer_timeout=0.1, **SWAPPED)
    requests = [make_request([number, 8, 9], 8) for number in range(2)]
    copier.gate.clear()
    for request in requests:
        core.add(request)
    while core.scheduler.counts.num_failed_swap_outs == 0:
        core.step()
    copier.gate.set()
    finish(core, *requests)
    check_tokens(*requests)
    check_idle(core)


def test_swapping_is_chosen_by_bytes_against_tokens() -> None:
    cost = SwapCost(bytes_per_block=int(ASSUMED_BYTES_PER_SECOND) // 100)
    assert cost.is_swap_cheaper(num_blocks=3, num_tokens=5)[0], "nothing is known of computing yet"
    assert not cost.is_swap_cheaper(num_blocks=1, num_tokens=0)[0], "there is nothing to keep"
    cost.observe(1.0, 100)
    cost.observe(50.0, 100)
    assert cost.is_swap_cheaper(num_blocks=1, num_tokens=3) == (
        True,
        "0.02 s to copy 1 blocks, 0.03 s to compute 3 tokens",
    )
    assert not cost.is_swap_cheaper(num_blocks=1, num_tokens=2)[0]
    core, _ = make_core(num_blocks=6, block_size=2, **SWAPPED)
    core._swap_cost.bytes_per_block = 10**15
    requests = [make_request([number, 8, 9], 8) for number in range(3)]
    run_all(core, requests)
    assert core.scheduler.counts.num_preemptions > core.scheduler.counts.num_swap_outs == 0
