"""Continuous batching: budget, order, blocks and preemption, with a model that is only its cache."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_dsa.engine.core import EngineCore
from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.step_plan import SchedulerLimits
from tests.engine.fakes import finish, greedy_continuation, make_core, make_request

ARRIVALS = st.lists(
    # step of arrival, prompt length, max_tokens
    st.tuples(st.integers(0, 12), st.integers(1, 13), st.integers(1, 9)),
    min_size=1,
    max_size=10,
)


def prompt_of(number: int, length: int) -> list[int]:
    return [(7 * number + place) % 50 for place in range(length)]


def largest_request(arrivals: list[tuple[int, int, int]], block_size: int) -> int:
    return max(-(-(length + count - 1) // block_size) for _, length, count in arrivals)


def serve(core: EngineCore, arrivals: list[tuple[int, int, int]]) -> list[Request]:
    """Add requests at their steps and run until all are done; integrity is checked after every step."""
    ordered = sorted(arrivals)
    requests = [make_request(prompt_of(number, length), count) for number, (_, length, count) in enumerate(ordered)]
    added = 0
    for step in range(5_000):
        while added < len(requests) and ordered[added][0] <= step:
            core.add(requests[added])
            added += 1
        core.step()
        core.scheduler.check_integrity()
        if added == len(requests) and all(request.finish_reason is not None for request in requests):
            return requests
    raise AssertionError("requests are left unfinished")


@settings(max_examples=150, deadline=None)
@given(
    arrivals=ARRIVALS,
    block_size=st.sampled_from([1, 2, 3, 8]),
    max_num_seqs=st.integers(1, 5),
    spare_budget=st.integers(0, 9),
    spare_blocks=st.integers(0, 12),
)
def test_every_request_gets_its_own_tokens_whatever_arrives(
    arrivals: list[tuple[int, int, int]], block_size: int, max_num_seqs: int, spare_budget: int, spare_blocks: int
) -> None:
    budget = max_num_seqs + spare_budget
    core, model = make_core(
        num_blocks=largest_request(arrivals, block_size) + spare_blocks,
        block_size=block_size,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
    )
    for request in serve(core, arrivals):
        output = request.output()
        assert output.token_ids == greedy_continuation(output.prompt_token_ids, request.max_tokens)
    assert max(len(inputs.token_ids) for inputs in model.steps) <= budget
    assert max(len(inputs.block_table) for inputs in model.steps) <= max_num_seqs
    assert core.scheduler.num_running == core.scheduler.num_waiting == 0


def test_preemption_happens_and_changes_no_token() -> None:
    core, model = make_core(num_blocks=6, block_size=2, max_num_batched_tokens=16)
    requests = serve(core, [(0, 3, 8), (0, 3, 8), (0, 3, 8)])
    assert core.scheduler.counts.num_preemptions > 0
    assert sum(request.num_preemptions for request in requests) == core.scheduler.counts.num_preemptions
    assert requests[0].num_preemptions == 0, "the oldest never gives way"
    for request in requests:
        assert request.output().token_ids == greedy_continuation(prompt_of(requests.index(request), 3), 8)
    # 3 prompt tokens and 7 fed ones each, and whatever was computed again.
    assert sum(len(inputs.token_ids) for inputs in model.steps) > 3 * 10


def test_decode_rows_come_first_and_prefill_takes_what_the_budget_leaves() -> None:
    core, model = make_core(num_blocks=40, max_num_batched_tokens=4, max_num_seqs=3)
    first, second = make_request([1, 2], 9), make_request(range(11), 2)
    core.add(first)
    core.step()
    core.add(second)
    for _ in range(4):
        core.step()
    rows = [inputs.positions.tolist() for inputs in model.steps]
    assert rows == [[0, 1], [2, 0, 1, 2], [3, 3, 4, 5], [4, 6, 7, 8], [5, 9, 10]]


def test_requests_start_in_the_order_of_their_arrival() -> None:
    core, _ = make_core(num_blocks=8, block_size=2, max_num_batched_tokens=64, max_num_seqs=8)
    large, small = make_request(range(12), 4), make_request([1], 1)
    blocker = make_request([5, 6, 7], 3)
    for request in (blocker, large, small):
        core.add(request)
    core.step()
    assert large.line is None, "there is no room yet"
    assert small.line is None
    assert small.num_tokens == 1, "the small one would fit, but the large one came first"
    finish(core, blocker, large, small)


def test_the_worked_example_of_the_scheduler_is_what_happens() -> None:
    core, model = make_core(num_blocks=4, block_size=2, max_num_batched_tokens=4)
    a, b = make_request([1, 2, 3], 4), make_request([4, 5, 6, 7], 1)
    core.add(a)
    core.add(b)
    held = []
    while b.finish_reason is None:
        core.step()
        held.append((model.steps[-1].positions.tolist(), len(a.blocks)))
    assert held == [([0, 1, 2], 2), ([3], 2), ([4], 3), ([5], 0), ([0, 1, 2, 3], 0)]


def test_an_aborted_request_gives_its_blocks_back_and_the_others_go_on() -> None:
    core, _ = make_core(num_blocks=8, max_num_seqs=2)
    requests = [make_request(prompt_of(number, 3), 6) for number in range(3)]
    for request in requests:
        core.add(request)
    core.step()
    core.abort(requests[0])
    core.abort(requests[0])
    core.scheduler.check_integrity()
    finish(core, *requests)
    assert requests[0].output().finish_reason == "abort"
    assert requests[2].output().token_ids == greedy_continuation(prompt_of(2, 3), 6)


def test_a_request_larger_than_the_cache_is_refused_and_the_largest_possible_one_runs() -> None:
    core, _ = make_core(num_blocks=4, block_size=2)
    with pytest.raises(ValueError, match=r"fits into the cache of 4 blocks, got 5 \+ 5 tokens .* which need 5"):
        core.add(make_request(range(5), 5))
    fitting = make_request(range(5), 4)
    core.add(fitting)
    finish(core, fitting)
    assert fitting.output().token_ids == greedy_continuation(range(5), 4)


def test_a_budget_below_the_number_of_requests_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_num_batched_tokens: expected max_num_seqs \(4\) or more, got 3"):
        SchedulerLimits(max_num_batched_tokens=3, max_num_seqs=4, max_model_len=8, block_size=2)


def test_the_integrity_check_finds_a_planted_mistake() -> None:
    core, _ = make_core(num_blocks=8)
    request = make_request([1, 2, 3], 4)
    core.add(request)
    core.step()
    core.scheduler.tables.main[request.line, 1] = request.blocks[0]
    with pytest.raises(AssertionError, match="the block table differs"):
        core.scheduler.check_integrity()
