"""Which token follows from logits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from fastdeploy_dsa.engine.sampler import (
    NonFiniteLogitsError,
    Purpose,
    SamplingRow,
    pick,
    sample,
    token_weights,
    top_logprobs,
    uniform,
)
from fastdeploy_dsa.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def kept(params: SamplingParams, logits: np.ndarray = LOGITS) -> set[int]:
    return set(np.flatnonzero(token_weights(logits, params)).tolist())


def draw(logits: np.ndarray, params: SamplingParams, count: int, seed: int = 11) -> np.ndarray:
    """Tokens of count positions of one request."""
    rows = [SamplingRow(params, (seed, 0), position) for position in range(count)]
    return np.array(sample(np.tile(logits, (count, 1)), rows))


def chi_square_bound(degrees: int, deviations: float = 4.0) -> float:
    """Value that chi-square exceeds as rarely as a normal number exceeds so many standard deviations (3e-5).

    Source: Wilson and Hilferty, 1931.
    """
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + deviations * math.sqrt(spread)) ** 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.5, top_k=7),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02),
    ],
    ids=lambda params: f"T{params.temperature}-k{params.top_k}-p{params.top_p}-m{params.min_p}",
)
def test_samples_follow_the_distribution(params: SamplingParams) -> None:
    logits = np.random.default_rng(3).standard_normal(20).astype(np.float32)
    weights = token_weights(logits, params)
    expected = 20_000 * weights / weights.sum()
    counts = np.bincount(draw(logits, params, 20_000), minlength=20)
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    distance = float((np.square(counts - expected)[possible] / expected[possible]).sum())
    bound = chi_square_bound(int(possible.sum()) - 1)
    assert not distance > bound, f"chi-square {distance:.1f} above {bound:.1f}"


def test_the_chi_square_test_notices_a_shifted_distribution() -> None:
    weights = token_weights(LOGITS, SamplingParams(temperature=1.1))
    expected = 20_000 * weights / weights.sum()
    counts = np.bincount(draw(LOGITS, SamplingParams(), 20_000), minlength=4)
    assert float((np.square(counts - expected) / expected).sum()) > chi_square_bound(3)


def by_definition(logits: np.ndarray, params: SamplingParams) -> dict[int, float]:
    """Temperature, min_p, top_k, top_p on a sorted list, step by step."""
    wide = [(float(value) - float(logits.max())) / params.temperature for value in logits]
    ranked = sorted(((math.exp(value), -token) for token, value in enumerate(wide)), reverse=True)
    ranked = [entry for entry in ranked if entry[0] >= params.min_p]
    if params.top_k:
        ranked = ranked[: params.top_k]
    result, total, before = {}, math.fsum(weight for weight, _ in ranked), 0.0
    for weight, negative in ranked:
        if params.top_p < 1.0 and before >= params.top_p * total:
            break
        result[-negative] = weight
        before += weight
    return {token: weight for token, weight in result.items() if weight > 0}


@settings(max_examples=300, deadline=None)
@given(
    logits=st_numpy.arrays(
        np.float32, st.integers(1, 12), elements=st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), fill=st.nothing()
    ),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([1e-9, 0.3, 0.6000001, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_filters_agree_with_their_definition(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = by_definition(logits, params)
    weights = token_weights(logits, params)
    assert set(np.flatnonzero(weights).tolist()) == set(expected)
    for token, weight in expected.items():
        assert not abs(weights[token] - weight) > 1e-14


def test_greedy_takes_the_smallest_id_of_equal_logits() -> None:
    logits = np.array([[0.0, 2.0, 2.0, 2.0], [1.0, 1.0, 0.0, 1.0]], np.float32)
    assert sample(logits, [SamplingRow(GREEDY, (0, 0), 5)] * 2) == [1, 0]


def test_top_k_of_one_is_greedy_even_among_equal_logits() -> None:
    logits = np.array([0.0, 2.0, 2.0, 1.0], np.float32)
    assert set(draw(logits, SamplingParams(top_k=1), 50).tolist()) == {1}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), {0, 1, 2, 3}),
        (SamplingParams(top_k=-1), {0, 1, 2, 3}),
        (SamplingParams(top_k=2), {1, 3}),
        (SamplingParams(top_k=4), {0, 1, 2, 3}),
        (SamplingParams(top_k=99), {0, 1, 2, 3}),
        (SamplingParams(top_p=1e-12), {1}),
        (SamplingParams(top_p=0.39), {1}),
        (SamplingParams(top_p=0.41), {1, 3}),
        (SamplingParams(top_p=0.95), {0, 1, 2, 3}),
        (SamplingParams(min_p=1.0), {1}),
        (SamplingParams(min_p=0.74), {1, 3}),
        # Of the two that top_k leaves, the first has 4/7 = 0.571: top_p counts what is left, not the whole.
        (SamplingParams(top_k=2, top_p=0.55), {1}),
        (SamplingParams(top_k=2, top_p=0.58), {1, 3}),
        # min_p comes before top_p: of {1, 3} with 4/7 and 3/7.
        (SamplingParams(min_p=0.6, top_p=0.55), {1}),
    ],
    ids=str,
)
def test_filters_keep(params: SamplingParams, expected: set[int]) -> None:
    assert kept(params) == expected


@pytest.mark.parametrize("temperature", [1e-300, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert set(draw(LOGITS, SamplingParams(temperature=temperature), 20).tolist()) == {1}


def test_tokens_with_logit_minus_infinity_are_never_chosen() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    assert set(draw(logits, SamplingParams(temperature=9.0), 200).tolist()) == {1, 3}


@pytest.mark.parametrize("number", [0.0, 0.5, np.nextafter(1.0, 0.0)])
def test_pick_never_returns_a_token_of_weight_zero(number: float) -> None:
    assert pick(np.array([0.0, 0.3, 0.0, 0.7, 0.0]), number) in (1, 3)


def test_a_row_does_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((16, 40)).astype(np.float32)
    params = SamplingParams(temperature=0.9, top_k=30, top_p=0.9)
    rows = [SamplingRow(replace(params, temperature=0.0 if n % 3 == 0 else 0.9), (n, 0), 100 + n) for n in range(16)]
    together = sample(logits, rows)
    order = rng.permutation(16)
    shuffled = sample(logits[order], [rows[line] for line in order])
    assert [together[line] for line in order] == shuffled
    assert together == [sample(logits[line : line + 1], [row])[0] for line, row in enumerate(rows)]


def test_random_numbers_depend_on_key_position_and_purpose_alone() -> None:
    keys = [(seed, part) for seed in (0, 1, 2**64 - 1) for part in (0, 1)]
    arguments = [(key, position, purpose) for key in keys for position in (0, 1, 4095) for purpose in Purpose]
    numbers = [uniform(*argument) for argument in arguments]
    assert len(set(numbers)) == len(numbers)
    assert numbers[::-1] == [uniform(*argument) for argument in arguments[::-1]]
    assert all(0.0 <= number < 1.0 for number in numbers)


def test_random_numbers_are_those_of_philox() -> None:
    for key in ((0, 0), (3, 9), (2**64 - 1, 2**64 - 1)):
        for position in (0, 1, 2**31):
            for purpose in Purpose:
                counter = np.array([position, purpose, 0, 0], np.uint64)
                philox = np.random.Philox(key=np.array(key, np.uint64), counter=counter)
                assert uniform(key, position, purpose) == np.random.Generator(philox).random()


def test_logprobs_are_those_of_the_unprocessed_logits() -> None:
    entries = top_logprobs(LOGITS, token=1, count=4)
    assert list(entries) == [1, 3, 2, 0]
    for token, probability in enumerate(PROBABILITIES):
        assert entries[token].logprob == pytest.approx(math.log(probability), abs=1e-6)
    assert [entry.rank for entry in entries.values()] == [1, 2, 3, 4]


def test_logprobs_hold_the_chosen_token_also_when_it_is_not_among_the_largest() -> None:
    entries = top_logprobs(LOGITS, token=0, count=2)
    assert list(entries) == [1, 3, 0]
    assert entries[0].rank == 4
    assert list(top_logprobs(LOGITS, token=2, count=0)) == [2]


def test_equal_logprobs_rank_by_id() -> None:
    entries = top_logprobs(np.zeros(5, np.float32), token=3, count=2)
    assert {token: entry.rank for token, entry in entries.items()} == {0: 1, 1: 2, 3: 4}


@pytest.mark.parametrize("params", [GREEDY, SamplingParams()], ids=["greedy", "random"])
@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]], ids=["nan", "inf", "no-token"])
def test_logits_without_a_largest_finite_one_are_an_error(params: SamplingParams, bad: list[float]) -> None:
    with pytest.raises(NonFiniteLogitsError, match="the largest of the model's logits is"):
        sample(np.array([[0.0, 1.0], bad], np.float32), [SamplingRow(params, (0, 0), 0)] * 2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens: expected an int of 1 or more, got 0"),
        ("max_tokens", 1.5, "max_tokens: expected an int of 1 or more, got 1.5"),
        ("max_tokens", True, "max_tokens: expected an int of 1 or more, got True"),
        ("temperature", -0.1, r"temperature: expected a number in [0, inf), got -0.1"),
        ("temperature", float("nan"), r"temperature: expected a number in [0, inf), got nan"),
        ("temperature", float("inf"), r"temperature: expected a number in [0, inf), got inf"),
        ("temperature", "hot", r"temperature: expected a number in [0, inf), got 'hot'"),
        ("top_k", -2, "top_k: expected an int of -1 or more, got -2"),
        ("top_p", 0.0, "top_p: expected a number in (0, 1], got 0.0"),
        ("top_p", 1.01, "top_p: expected a number in (0, 1], got 1.01"),
        ("min_p", -0.01, "min_p: expected a number in [0, 1], got -0.01"),
        ("seed", -1, f"seed: expected an int of 0 to {2**64 - 1}, got -1"),
        ("seed", 2**64, f"seed: expected an int of 0 to {2**64 - 1}, got {2**64}"),
        ("stop", "", "stop: expected a string or strings, none of them empty, got ''"),
        ("stop", ["a", ""], "stop: expected a string or strings, none of them empty, got ['a', '']"),
        ("stop", [3], "stop: expected a string or strings, none of them empty, got [3]"),
        ("stop_token_ids", 5, "stop_token_ids: expected a sequence of token ids, got 5"),
        ("stop_token_ids", [-1], "stop_token_ids: expected an int of 0 or more, got -1"),
        ("ignore_eos", 1, "ignore_eos: expected True or False, got 1"),
        ("logprobs", -1, "logprobs: expected an int of 0 or more, got -1"),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_params_are_normal_after_construction() -> None:
    params = SamplingParams(stop="x", top_k=-1, stop_token_ids=[np.int64(3)], temperature=1)
    assert (params.stop, params.top_k, params.stop_token_ids, params.temperature) == (("x",), 0, (3,), 1.0)
    assert hash(params) == hash(replace(params))
