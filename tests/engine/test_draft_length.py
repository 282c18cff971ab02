"""How many drafts a request gets."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fastdeploy_dsa.engine.speculative.draft_length import DraftLength


def rounds(length: DraftLength, rate: float, count: int, seed: int = 0) -> list[int]:
    """Drafts of every round if each is accepted with the rate behind accepted ones."""
    rng, chosen = np.random.default_rng(seed), []
    for _ in range(count):
        drafts = length.choose()
        chosen.append(drafts)
        fates = rng.random(drafts) < rate
        length.observe(drafts, drafts if fates.all() else int(fates.argmin()))
    return chosen


def test_good_drafts_are_asked_for_up_to_the_limit() -> None:
    chosen = rounds(DraftLength(4, 0.1, is_adaptive=True), 1.0, 50)
    assert chosen[0] >= 2
    assert chosen[3:] == [4] * 47


def test_bad_drafts_are_given_up_after_a_few_rounds_and_tried_again_ever_more_rarely() -> None:
    chosen = rounds(DraftLength(3, 0.1, is_adaptive=True), 0.0, 400)
    tries = [place for place, drafts in enumerate(chosen) if drafts]
    assert sum(chosen[:10]) <= 12
    later = [place for place in tries if place > 10]
    pauses = np.diff(later).tolist()
    assert all(longer >= shorter for shorter, longer in pairwise(pauses))
    assert len(later) <= 7
    assert all(chosen[place] == 1 for place in later)


def test_drafts_come_back_when_they_are_right_again() -> None:
    length = DraftLength(3, 0.1, is_adaptive=True)
    rounds(length, 0.0, 60)
    assert rounds(length, 1.0, 200)[-1] == 3


@pytest.mark.parametrize("rate", [0.45, 0.6, 0.8])
def test_the_length_is_about_the_one_that_gives_most_tokens_per_time(rate: float) -> None:
    limit, cost = 5, 0.1
    gains = [sum(rate**place for place in range(k + 1)) / (1 + cost * k) for k in range(limit + 1)]
    chosen = rounds(DraftLength(limit, cost, is_adaptive=True), rate, 2000)
    average = np.mean([gains[k] for k in chosen])
    assert average > 0.9 * max(gains)


def test_without_adaption_the_length_is_the_limit() -> None:
    assert rounds(DraftLength(2, 0.1, is_adaptive=False), 0.0, 20) == [2] * 20
