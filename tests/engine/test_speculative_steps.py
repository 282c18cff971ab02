"""Drafts under the scheduler: rounds, rollback, prefixes, preemption and failures, with models that are only caches.

CacheDrafter finds every entry that does not belong to the request's tokens, and every step ends with the integrity
checks of engine and cache manager.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_manager import TransferTimeout
from fastdeploy_dsa.engine.core import EngineCore
from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.sampler import NonFiniteLogitsError
from fastdeploy_dsa.engine.sampling_params import SamplingParams
from fastdeploy_dsa.engine.step_plan import SchedulerLimits
from tests.engine.draft_fakes import CacheDrafter, Drafting, always_right, always_wrong, at_times_right
from tests.engine.fakes import FaultyCopier, finish, greedy_continuation, make_core, make_request
from tests.engine.test_scheduler_cache import ARRIVALS, MODES, check_idle, check_tokens, prompt_of

RANDOM = SamplingParams(temperature=1.3, top_k=7, seed=1)


def drafter_of(core: EngineCore) -> CacheDrafter:
    assert core._proposer is not None
    drafter = core._proposer._look_ahead._runner
    assert isinstance(drafter, CacheDrafter)
    return drafter


def run_all(core: EngineCore, *requests: Request) -> None:
    for request in requests:
        core.add(request)
    finish(core, *requests)


def serve_arrivals(core: EngineCore, arrivals: list[Any], requests: list[Request]) -> None:
    """Add and abort requests at their steps, and run until all are done."""
    added = 0
    for step in range(2_000):
        while added < len(requests) and arrivals[added][0] <= step:
            core.add(requests[added])
            added += 1
        for arrival, request in zip(arrivals[:added], requests, strict=False):
            if arrival[5] == step:
                core.abort(request)
        with suppress(TransferTimeout):
            core.step()
        if added == len(requests) and all(request.finish_reason is not None for request in requests):
            return
    raise AssertionError("requests are left unfinished")


@settings(max_examples=300, deadline=None)
@given(
    arrivals=ARRIVALS,
    mode=st.sampled_from(MODES),
    block_size=st.sampled_from([1, 2, 3, 8]),
    max_num_seqs=st.integers(1, 4),
    spare_budget=st.integers(0, 9),
    spare_blocks=st.integers(0, 8),
    num_speculative_tokens=st.integers(1, 5),
    drafts=st.sampled_from([always_right, always_wrong, at_times_right]),
    adaptive=st.booleans(),
    is_random=st.booleans(),
    failing_copies=st.sets(st.integers(0, 30)),
    slow_copies=st.sets(st.integers(0, 30)),
    transfer_timeout=st.sampled_from([20.0, 0.002]),
)
def test_every_request_gets_its_own_tokens_whatever_is_drafted_shared_swapped_slow_or_fails(
    *,
    arrivals: list[tuple[int, int, int, int, int, int | None]],
    mode: dict[str, Any],
    block_size: int,
    max_num_seqs: int,
    spare_budget: int,
    spare_blocks: int,
    num_speculative_tokens: int,
    drafts: Any,
    adaptive: bool,
    is_random: bool,
    failing_copies: set[int],
    slow_copies: set[int],
    transfer_timeout: float,
) -> None:
    largest = max(-(-(length + rest + count - 1) // block_size) for _, _, length, rest, count, _ in arrivals)
    drafting = Drafting(num_speculative_tokens, drafts, adaptive)
    core, model = make_core(
        num_blocks=largest + spare_blocks,
        block_size=block_size,
        max_num_batched_tokens=max_num_seqs * (1 + num_speculative_tokens) + spare_budget,
        max_num_seqs=max_num_seqs,
        copier=FaultyCopier(failing_copies.__contains__, slow_copies.__contains__),
        transfer_timeout=transfer_timeout,
        drafting=drafting,
        **mode,
    )
    arrivals = sorted(arrivals, key=lambda arrival: arrival[0])
    params = RANDOM if is_random else SamplingParams(temperature=0.0)

    def requests_of() -> list[Request]:
        return [
            make_request(prompt_of(beginning, length, number, rest), count, params=params, random_key=(number, 1))
            for number, (_, beginning, length, rest, count, _) in enumerate(arrivals)
        ]

    requests = requests_of()
    serve_arrivals(core, arrivals, requests)
    if is_random:
        for request, alone in zip(requests, requests_of(), strict=True):
            run_all(make_core(num_blocks=100, drafting=drafting, max_num_batched_tokens=24)[0], alone)
            tokens = request.output().token_ids
            assert tokens == alone.output().token_ids[: len(tokens)]
            assert request.finish_reason == "abort" or len(tokens) == request.max_tokens
    else:
        check_tokens(*requests)
    check_idle(core)
    budget = max_num_seqs * (1 + num_speculative_tokens) + spare_budget
    assert max((len(inputs.token_ids) for inputs in model.steps), default=0) <= budget


def by_position(wrong: set[int]) -> Any:
    """Drafts that are wrong for the tokens at these positions only."""

    def drafts(tokens: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return -logits if len(tokens) in wrong else logits

    return drafts


def test_the_worked_example_of_a_round_is_what_happens() -> None:
    """Confirmed 100, pending at 100, three drafts of which two are accepted: rule S10 to S15, section 8."""
    core, model = make_core(
        num_blocks=40,
        block_size=4,
        max_num_batched_tokens=128,
        max_model_len=128,
        drafting=Drafting(3, by_position({103}), adaptive=False),
    )
    request = make_request([number % 50 for number in range(100)], 20)
    core.add(request)
    core.step()  # the prompt and the token at 100
    drafter = drafter_of(core)
    assert (request.num_computed, request.num_tokens, len(request.drafts)) == (100, 101, 3)
    drafts = [draft.token for draft in request.drafts]
    drafter.calls.clear()
    core.step()
    verify = model.steps[-1]
    assert verify.positions.tolist() == [100, 101, 102, 103]
    assert verify.token_ids.tolist() == [request.tokens[100], *drafts]
    assert verify.logits_rows.tolist() == [0, 1, 2, 3]
    assert (request.num_computed, request.num_tokens) == (103, 104)
    assert request.tokens[101:103].tolist() == drafts[:2]
    assert request.tokens[103] != drafts[2]
    first, second, third = (call.inputs for call in drafter.calls)
    assert (first.positions.tolist(), first.token_ids.tolist()) == ([100, 101, 102], request.tokens[101:104].tolist())
    assert first.logits_rows.tolist() == [2]
    proposed = [draft.token for draft in request.drafts]
    assert (second.positions.tolist(), second.token_ids.tolist()) == ([103], proposed[:1])
    assert (third.positions.tolist(), third.token_ids.tolist()) == ([104], proposed[1:2])
    assert [call.follows_target for call in drafter.calls] == [True, False, False]
    core.step()
    assert model.steps[-1].positions.tolist() == [103, 104, 105, 106]
    finish(core, request)


def test_rejected_drafts_leave_a_request_with_the_blocks_of_its_computed_tokens() -> None:
    core, _ = make_core(
        num_blocks=40, block_size=2, max_num_batched_tokens=64, drafting=Drafting(5, always_wrong, False)
    )
    request = make_request([1, 2, 3], 30)
    core.add(request)
    while request.finish_reason is None:
        core.step()
        assert len(request.blocks) == (0 if request.table is None else -(-request.num_computed // 2))
    assert request.output().token_ids == greedy_continuation([1, 2, 3], 30)
    stats = core._proposer.stats  # type: ignore[union-attr]
    assert (stats.num_rounds, stats.num_tokens, sum(stats.num_accepted)) == (30, 30, 0)


def test_right_drafts_need_one_step_for_all_of_them_and_one_token_more() -> None:
    core, model = make_core(num_blocks=40, max_num_batched_tokens=64, drafting=Drafting(4, always_right, False))
    request = make_request([1, 2, 3], 21)
    run_all(core, request)
    assert request.output().token_ids == greedy_continuation([1, 2, 3], 21)
    assert [len(inputs.token_ids) for inputs in model.steps] == [3, 5, 5, 5, 5]
    stats = core._proposer.stats  # type: ignore[union-attr]
    assert (stats.tokens_per_round, stats.acceptance_by_position) == (21 / 5, [1.0] * 4)


def test_no_draft_is_made_that_a_request_has_no_room_for() -> None:
    """Rule S10: with two positions left in max_model_len, and in the whole cache, there is one draft at most."""
    core, model = make_core(
        num_blocks=4,
        block_size=4,
        max_num_batched_tokens=64,
        max_model_len=16,
        drafting=Drafting(3, always_right, False),
    )
    request = make_request(range(14), 3)
    run_all(core, request)
    assert request.output().token_ids == greedy_continuation(range(14), 3)
    assert [inputs.positions.tolist() for inputs in model.steps[1:]] == [[14, 15]]
    assert max(call.inputs.positions.max() for call in drafter_of(core).calls) <= 15


def test_a_stop_token_among_accepted_drafts_ends_the_request_and_nothing_behind_it_leaks() -> None:
    expected = greedy_continuation([4, 5, 6], 12)
    stop = expected[3]
    place = expected.index(stop)
    assert 0 < place < 6, "inside the first round, with accepted drafts behind it"
    core, _ = make_core(num_blocks=40, max_num_batched_tokens=64, drafting=Drafting(5, always_right, False))
    request = make_request([4, 5, 6], 12, params=SamplingParams(temperature=0.0, stop_token_ids=[stop], logprobs=2))
    run_all(core, request)
    output = request.output()
    assert output.token_ids == expected[: place + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert [next(iter(entries)) for entries in output.logprobs or ()] == output.token_ids
    assert core.scheduler.num_running == 0


def test_a_prefill_a_round_with_drafts_and_one_without_share_a_step_and_change_nothing() -> None:
    core, model = make_core(
        num_blocks=60, max_num_batched_tokens=14, max_num_seqs=3, drafting=Drafting(3, by_position(set()), True)
    )
    with_drafts, without, late = make_request([1, 2], 20), make_request([3, 4], 9), make_request(range(30), 4)
    core.add(with_drafts)
    core.add(without)
    core.step()
    without.drafts = []
    core.add(late)
    core.step()
    mixed = model.steps[-1]
    assert np.bincount(mixed.request_ids).tolist() == [4, 1, 9]
    finish(core, with_drafts, without, late)
    for request in (with_drafts, without, late):
        output = request.output()
        assert output.token_ids == greedy_continuation(output.prompt_token_ids, request.max_tokens)


def test_preemption_keeps_the_drafts_and_verifies_them_with_what_is_computed_again() -> None:
    core, model = make_core(
        num_blocks=12,
        block_size=2,
        max_num_batched_tokens=32,
        is_prefix_cached=False,
        drafting=Drafting(3, always_right, False),
    )
    requests = [make_request(prompt_of(0, 3, number, 1), 12) for number in range(3)]
    run_all(core, *requests)
    assert core.scheduler.counts.num_preemptions > 0
    for request in requests:
        output = request.output()
        assert output.token_ids == greedy_continuation(output.prompt_token_ids, 12)
    again = [inputs for inputs in model.steps if 0 in inputs.positions and len(inputs.logits_rows) > 3]
    assert again, "no step computes a request again and verifies its drafts"


def test_a_hit_is_a_block_shorter_where_the_token_behind_it_is_unknown() -> None:
    prompt = list(range(8))
    hits = []
    for drafting in (None, Drafting(2)):
        core, _ = make_core(num_blocks=40, block_size=4, max_num_batched_tokens=64, drafting=drafting)
        run_all(core, make_request(prompt, 4), make_request(prompt, 4))
        hits.append(core._cache.stats().num_device_hit_tokens)
    assert hits == [7, 4]


def test_a_request_that_gets_no_drafts_is_caught_up_on_in_groups() -> None:
    core, model = make_core(
        num_blocks=200, block_size=4, max_num_batched_tokens=64, max_model_len=300, drafting=Drafting(3, always_wrong)
    )
    request = make_request([1, 2, 3], 120)
    run_all(core, request)
    assert request.output().token_ids == greedy_continuation([1, 2, 3], 120)
    calls = drafter_of(core).calls
    assert len(calls) < len(model.steps) / 3
    assert sum(call.follows_target * len(call.inputs.token_ids) for call in calls) == 122, "every position once"


def serve_until_behind(core: EngineCore, request: Request) -> None:
    """Step until several computed positions have no draft entries yet."""
    core.add(request)
    while request.num_undrafted < 5:
        core.step()
        assert request.finish_reason is None


def test_blocks_that_lack_draft_entries_are_no_hits_yet() -> None:
    core, _ = make_core(
        num_blocks=200, block_size=2, max_num_batched_tokens=64, max_model_len=300, drafting=Drafting(3, always_wrong)
    )
    first = make_request([1, 2, 3], 120)
    serve_until_behind(core, first)
    complete = first.num_computed - first.num_undrafted
    prompt = first.known_tokens.tolist()
    assert core._cache.match(prompt).num_tokens == complete - complete % 2
    second = make_request(prompt, 30)
    core.add(second)
    finish(core, first, second)
    assert second.output().token_ids == greedy_continuation(prompt, 30)


def test_a_request_that_ends_leaves_blocks_with_all_their_entries() -> None:
    core, _ = make_core(
        num_blocks=200, block_size=2, max_num_batched_tokens=64, max_model_len=300, drafting=Drafting(3, always_wrong)
    )
    first = make_request([1, 2, 3], 120)
    serve_until_behind(core, first)
    first.max_tokens = first.num_tokens + 1 - first.num_prompt
    core.step()
    assert first.finish_reason == "length"
    prompt = first.known_tokens.tolist()
    hit = core._cache.match(prompt).num_tokens
    assert hit == (len(prompt) - 1) // 2 * 2
    second = make_request(prompt, 30)
    run_all(core, second)
    assert second.output().token_ids == greedy_continuation(prompt, 30)


def test_a_request_that_is_computed_again_is_drafted_again_from_its_beginning() -> None:
    core, _ = make_core(
        num_blocks=40,
        block_size=2,
        max_num_batched_tokens=32,
        is_prefix_cached=False,
        drafting=Drafting(3, always_wrong),
    )
    first, second = make_request([1, 2, 3], 50), make_request([4, 5, 6], 50)
    run_all(core, first, second)
    assert second.num_preemptions > 0
    for request in (first, second):
        assert request.output().token_ids == greedy_continuation(request.output().prompt_token_ids, 50)


def test_logits_of_the_draft_model_that_are_no_numbers_are_an_error_and_the_request_goes_on_without() -> None:
    is_broken = True

    def drafts(tokens: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return logits * np.float32(np.nan) if is_broken and len(tokens) > 5 else logits

    core, _ = make_core(num_blocks=40, max_num_batched_tokens=64, drafting=Drafting(2, drafts, False))
    request = make_request([1, 2, 3], 12)
    core.add(request)
    with pytest.raises(NonFiniteLogitsError):
        finish(core, request)
    is_broken = False
    finish(core, request)
    assert request.output().token_ids == greedy_continuation([1, 2, 3], 12)


def test_a_budget_without_room_for_every_draft_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"max_num_batched_tokens: expected max_num_seqs \(4\) of 1 \+ 3 rows each or more, got 15"
    ):
        SchedulerLimits(
            max_num_batched_tokens=15, max_num_seqs=4, max_model_len=8, block_size=2, num_speculative_tokens=3
        )
