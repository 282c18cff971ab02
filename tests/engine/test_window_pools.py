"""The engine over a cache with window pools, with a model that looks at everything it has a right to find there.

Every step of these tests ends with the integrity check of engine and cache manager.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_manager import TransferTimeout
from fastdeploy_dsa.engine.cache_stats import EngineCacheStats
from fastdeploy_dsa.engine.scheduler import Scheduler
from tests.engine.draft_fakes import Drafting, always_wrong, at_times_right
from tests.engine.fakes import FaultyCopier, finish, make_core, make_request
from tests.engine.test_scheduler_cache import (
    ARRIVALS,
    check_idle,
    check_tokens,
    close_gate_at_loads,
    computed,
    prompt_of,
    run_all,
)
from tests.engine.window_fakes import POOLS

MODES: list[dict[str, Any]] = [
    {"is_prefix_cached": False, "num_host_blocks": 0},
    {"is_prefix_cached": True, "num_host_blocks": 0},
    {"is_prefix_cached": False, "num_host_blocks": 100},
    {"is_prefix_cached": True, "num_host_blocks": 100},
    {"is_prefix_cached": True, "num_host_blocks": 3},
]


@settings(max_examples=300, deadline=None)
@given(
    arrivals=ARRIVALS,
    mode=st.sampled_from(MODES),
    block_size=st.sampled_from([6, 12]),
    num_drafts=st.integers(0, 4),
    is_wrong=st.booleans(),
    max_num_seqs=st.integers(1, 4),
    spare_budget=st.integers(0, 12),
    spare_blocks=st.integers(0, 6),
    failing_copies=st.sets(st.integers(0, 30)),
    slow_copies=st.sets(st.integers(0, 30)),
    transfer_timeout=st.sampled_from([20.0, 0.002]),
)
def test_every_row_finds_the_rows_before_it_whatever_is_shared_swapped_rejected_slow_or_fails(
    *,
    arrivals: list[tuple[int, int, int, int, int, int | None]],
    mode: dict[str, Any],
    block_size: int,
    num_drafts: int,
    is_wrong: bool,
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
        max_num_batched_tokens=max_num_seqs * (1 + num_drafts) + spare_budget,
        max_num_seqs=max_num_seqs,
        copier=FaultyCopier(failing_copies.__contains__, slow_copies.__contains__),
        transfer_timeout=transfer_timeout,
        drafting=Drafting(num_drafts, always_wrong if is_wrong else at_times_right) if num_drafts else None,
        pools=POOLS,
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
    assert core.scheduler.counts.num_computed_tokens <= computed(model)


def test_a_prompt_in_chunks_of_any_size_finds_its_windows() -> None:
    for budget in (1, 2, 3, 5, 6, 7, 13, 40):
        core, model = make_core(
            num_blocks=20, block_size=6, max_num_batched_tokens=budget, max_num_seqs=1, pools=POOLS
        )
        request = make_request([place % 11 for place in range(37)], 9)
        run_all(core, [request])
        check_tokens(request)
        check_idle(core)
        assert computed(model) == 37 + 8


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("length", range(6, 12))
def test_rejected_drafts_at_every_phase_of_a_window_change_nothing(length: int, num_drafts: int) -> None:
    core, _ = make_core(
        num_blocks=20,
        block_size=6,
        max_num_batched_tokens=16,
        max_num_seqs=2,
        drafting=Drafting(num_drafts, always_wrong, adaptive=False),
        pools=POOLS,
    )
    request = make_request([place % 11 for place in range(length)], 17)
    run_all(core, [request])
    check_tokens(request)
    check_idle(core)
    assert core._proposer is not None
    stats = core._proposer.stats
    assert sum(stats.num_drafts) > sum(stats.num_accepted) == 0


def test_a_prefix_is_shared_up_to_a_boundary_and_no_further() -> None:
    core, model = make_core(num_blocks=40, block_size=6, max_num_batched_tokens=64, pools=POOLS)
    prompt = [place % 11 for place in range(21)]
    for continuation in ([40], [41, 42], []):
        run_all(core, [make_request([*prompt, *continuation], 2)])
    # 22 + 1, then 18 of 23 found, then 18 of 21.
    assert computed(model) == 23 + (5 + 1) + (3 + 1)
    run_all(core, [make_request(prompt[:18], 2)])  # cached as a whole: the last block is computed again
    assert computed(model) == 33 + 6 + 1
    assert core._cache.stats().num_copied_blocks == 0
    check_idle(core)


def test_a_request_waits_for_the_prefix_that_another_one_computes() -> None:
    core, model = make_core(num_blocks=60, block_size=6, max_num_batched_tokens=64, pools=POOLS)
    requests = [make_request([*range(12), 40 + number], 2) for number in range(4)]
    run_all(core, requests)
    check_tokens(*requests)
    assert [len(inputs.token_ids) for inputs in model.steps] == [13, 1 + 3, 3]
    check_idle(core)


def test_requests_that_give_way_take_their_windows_to_the_host_and_back() -> None:
    core, model = make_core(
        num_blocks=5, block_size=6, max_num_batched_tokens=16, is_prefix_cached=False, num_host_blocks=100, pools=POOLS
    )
    requests = [make_request([number, 8, 9], 20) for number in range(3)]
    run_all(core, requests)
    check_tokens(*requests)
    counts = core.scheduler.counts
    assert counts.num_swap_outs == counts.num_preemptions > 0
    assert computed(model) == 3 * 22, "3 prompt tokens and 19 fed ones each"
    check_idle(core)


def test_windows_are_sized_so_that_no_request_ever_waits_for_them() -> None:
    core, _ = make_core(
        num_blocks=100, block_size=6, max_num_batched_tokens=9, max_num_seqs=4, is_prefix_cached=False, pools=POOLS
    )
    requests = [make_request([number] * (5 + number), 30) for number in range(4)]
    run_all(core, requests)
    assert core.scheduler.counts.num_preemptions == 0
    check_idle(core)


def test_windows_that_are_too_small_are_refused() -> None:
    core, _ = make_core(num_blocks=10, block_size=6, max_num_seqs=2, is_prefix_cached=False, pools=POOLS)
    more = replace(core.scheduler._limits, max_num_seqs=3)
    with pytest.raises(ValueError, match=r"window_blocks: expected 16 or more of pool window for 3 requests, got 12"):
        Scheduler(more, core._cache, core._swap_cost)


def test_a_load_that_hangs_keeps_its_window_blocks_and_nothing_else_is_lost() -> None:
    copier = FaultyCopier()
    core, _ = make_core(
        num_blocks=4,
        block_size=6,
        max_num_seqs=1,
        max_num_batched_tokens=24,
        num_host_blocks=20,
        copier=copier,
        transfer_timeout=0.1,
        pools=POOLS,
    )
    prompt = [place % 11 for place in range(20)]
    for tokens in (prompt, range(20, 40)):
        run_all(core, [make_request(tokens, 1)])
    request = make_request(prompt, 1)
    core.add(request)
    close_gate_at_loads(core, copier)
    with pytest.raises(TransferTimeout):
        core.step()
    core.abort(request)
    core.scheduler.check_integrity()
    other = make_request(range(30, 48), 1)
    core.add(other)
    with pytest.raises(TransferTimeout):
        core.step()
    core.scheduler.check_integrity()
    copier.gate.set()
    finish(core, other)
    check_tokens(other)
    check_idle(core)


def test_statistics_show_windows_and_snapshots() -> None:
    core, _ = make_core(num_blocks=20, block_size=6, max_num_batched_tokens=64, pools=POOLS)
    run_all(core, [make_request([place % 11 for place in range(21)], 1)])
    table = EngineCacheStats(core.scheduler.counts, core._cache.stats()).table()
    assert "window blocks       0 owned, 9 cached, " in table
    assert "3 on the device, 0 on the host, 0 evicted; 0 cached tokens computed again" in table
    plain, _ = make_core(num_blocks=20)
    assert "snapshots" not in EngineCacheStats(plain.scheduler.counts, plain._cache.stats()).table()


def test_a_draft_model_that_lags_behind_finds_its_windows() -> None:
    core, _ = make_core(
        num_blocks=60,
        block_size=6,
        max_num_batched_tokens=8,
        max_num_seqs=4,
        max_model_len=128,
        drafting=Drafting(1, always_wrong),  # after some rejected drafts there are none for a while
        pools=POOLS,
    )
    requests = [make_request([number, 8, 9], 60) for number in range(4)]
    most = 0
    for request in requests:
        core.add(request)
    while any(request.finish_reason is None for request in requests):
        core.step()
        most = max(most, *(request.num_undrafted for request in requests))
    assert most > 12, "the draft model has hardly lagged behind"
    check_tokens(*requests)
    assert core.scheduler.counts.num_preemptions == 0
    check_idle(core)
