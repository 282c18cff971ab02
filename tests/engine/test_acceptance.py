"""Which drafts are kept: the target's tokens and distributions, whoever drafts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fastdeploy_dsa.engine.sampler import (
    NonFiniteLogitsError,
    Purpose,
    SamplingRow,
    pick,
    sample,
    token_weights,
    uniform,
)
from fastdeploy_dsa.engine.sampling_params import SamplingParams
from fastdeploy_dsa.engine.speculative.acceptance import Draft, accept

GREEDY = SamplingParams(temperature=0.0)
RANDOM = SamplingParams(temperature=1.0)
NUM_DRAWS = 20_000


def one_hot_rows(tokens: list[int], vocab_size: int = 12) -> np.ndarray:
    return np.eye(vocab_size, dtype=np.float32)[tokens]


def accept_one(logits: np.ndarray, row: SamplingRow, drafts: list[Draft]) -> list[int]:
    (tokens,) = accept(logits.astype(np.float32), [row], [drafts])
    return tokens


def logits_of(probabilities: list[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities, np.float64)).astype(np.float32)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * probabilities
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    return float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())


def chi_square_bound(degrees: int) -> float:
    """Exceeded with a chance of about 1e-5: Wilson-Hilferty with the normal quantile 4.265."""
    share = 2 / (9 * degrees)
    return degrees * (1 - share + 4.265 * share**0.5) ** 3


@pytest.mark.parametrize(
    ("drafts", "tokens"),
    [
        ([5, 7, 8], [5, 7, 9]),
        ([5, 7, 9], [5, 7, 9, 4]),
        ([1, 7, 9], [5]),
        ([1, 5], [5]),
        ([], [5]),
    ],
)
def test_greedy_keeps_drafts_as_long_as_they_are_the_likeliest(drafts: list[int], tokens: list[int]) -> None:
    logits = one_hot_rows([5, 7, 9, 4])[: len(drafts) + 1]
    assert accept_one(logits, SamplingRow(GREEDY, (0, 0), 3), [Draft(token) for token in drafts]) == tokens


def test_greedy_takes_the_smallest_of_equally_likely_tokens() -> None:
    logits = np.zeros((2, 4), np.float32)
    assert accept_one(logits, SamplingRow(GREEDY, (0, 0), 1), [Draft(0)]) == [0, 0]
    assert accept_one(logits, SamplingRow(GREEDY, (0, 0), 1), [Draft(1)]) == [0]


def test_requests_of_any_kind_share_a_batch() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((7, 9)).astype(np.float32)
    rows = [SamplingRow(GREEDY, (1, 1), 4), SamplingRow(RANDOM, (2, 2), 5), SamplingRow(RANDOM, (3, 3), 6)]
    drafts = [[Draft(int(logits[0].argmax())), Draft(3)], [Draft(2), Draft(4, np.full(9, 1 / 9))], []]
    together = accept(logits, rows, drafts)
    alone = [
        accept_one(logits[part], row, one)
        for part, row, one in zip((slice(0, 3), slice(3, 6), slice(6, 7)), rows, drafts, strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize("params", [GREEDY, RANDOM, SamplingParams(temperature=0.7, top_p=0.8)])
def test_without_drafts_it_is_sampling(params: SamplingParams) -> None:
    logits = np.random.default_rng(1).standard_normal((50, 30)).astype(np.float32)
    rows = [SamplingRow(params, (number, 7), number) for number in range(50)]
    assert [tokens for (tokens,) in accept(logits, rows, [[]] * 50)] == sample(logits, rows)


P, Q = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]


@pytest.mark.parametrize(
    ("target", "draft", "token", "acceptance", "residual"),
    [
        (P, Q, 1, 0.6, [1.0, 0.0, 0.0]),
        (P, Q, 0, 1.0, None),
        (P, Q, 2, 2 / 3, [1.0, 0.0, 0.0]),
        (P, None, 1, 0.3, [0.5 / 0.7, 0.0, 0.2 / 0.7]),
        (P, P, 1, 1.0, None),
        ([0.7, 0.0, 0.3], Q, 1, 0.0, [1.0, 0.0, 0.0]),
        ([0.7, 0.0, 0.3], None, 1, 0.0, [0.7, 0.0, 0.3]),
    ],
)
def test_a_draft_is_accepted_and_replaced_as_often_as_the_rule_says(
    target: list[float], draft: list[float] | None, token: int, acceptance: float, residual: list[float] | None
) -> None:
    distribution = None if draft is None else np.array(draft)
    logits = np.stack([logits_of(target), logits_of([1 / 3] * 3)])
    first, replaced = 0, Counter[int]()
    for number in range(NUM_DRAWS):
        tokens = accept_one(logits, SamplingRow(RANDOM, (number, 11), 5), [Draft(token, distribution)])
        if len(tokens) == 2:
            assert tokens[0] == token
            first += 1
        else:
            replaced[tokens[0]] += 1
    counts = np.array([first, NUM_DRAWS - first], np.float64)
    if acceptance in (0.0, 1.0):
        assert first == acceptance * NUM_DRAWS
    else:
        assert chi_square(counts, np.array([acceptance, 1 - acceptance])) < chi_square_bound(1)
    if residual is not None:
        found = np.array([replaced[place] for place in range(3)], np.float64)
        degrees = max(1, np.count_nonzero(residual) - 1)
        assert chi_square(found, np.array(residual)) < chi_square_bound(degrees)


@pytest.mark.parametrize("is_sampled", [True, False], ids=["sampled drafts", "chosen drafts"])
@pytest.mark.parametrize(
    "params",
    [RANDOM, SamplingParams(temperature=0.6, top_k=4), SamplingParams(temperature=1.5, top_p=0.8)],
    ids=["plain", "top_k", "top_p"],
)
def test_tokens_have_the_targets_distribution_whatever_is_drafted(params: SamplingParams, is_sampled: bool) -> None:
    """Chi-square over 20,000 draws of a pair of tokens, drafted by a model of another opinion."""
    size, rng = 5, np.random.default_rng(3)
    # The target's logits of the second token depend on the first; so do the draft model's.
    target, opinion = (rng.standard_normal((size + 1, size)).astype(np.float32) for _ in range(2))

    def distribution(logits: np.ndarray) -> np.ndarray:
        weights = token_weights(logits, params)
        return weights / weights.sum()

    def draft_at(logits: np.ndarray, key: tuple[int, int], position: int) -> Draft:
        if not is_sampled:
            return Draft(int(logits.argmax()))
        chances = distribution(logits)
        return Draft(pick(chances, uniform(key, position, Purpose.DRAFT)), chances)

    counts = np.zeros((size, size))
    for number in range(NUM_DRAWS):
        key, position = (number, 5), 7
        first = draft_at(opinion[size], key, position)
        second = draft_at(opinion[first.token], key, position + 1)
        logits = np.stack([target[size], target[first.token], target[second.token]])
        tokens = accept_one(logits, SamplingRow(params, key, position), [first, second])
        if len(tokens) == 1:  # the second token comes from a round of its own, with a draft of its own
            again = draft_at(opinion[tokens[0]], key, position + 1)
            row = SamplingRow(params, key, position + 1)
            tokens += accept_one(np.stack([target[tokens[0]], target[again.token]]), row, [again])
        counts[tokens[0], tokens[1]] += 1
    expected = np.stack([distribution(row) for row in target])
    joint = (expected[size][:, None] * expected[:size]).reshape(-1)
    assert chi_square(counts.reshape(-1), joint) < chi_square_bound(np.count_nonzero(joint) - 1)


def test_the_random_numbers_of_a_position_are_used_once_each() -> None:
    keys = {(position, purpose): uniform((3, 4), position, purpose) for position in range(50) for purpose in Purpose}
    assert len(set(keys.values())) == len(keys)


def test_logits_that_are_no_numbers_are_an_error_wherever_they_stand() -> None:
    logits = one_hot_rows([5, 7])
    logits[1, 3] = np.nan
    for params in (GREEDY, RANDOM):
        with pytest.raises(NonFiniteLogitsError):
            accept_one(logits, SamplingRow(params, (0, 0), 1), [Draft(5)])
