"""How many drafts a request gets, from how its drafts fared so far."""

from __future__ import annotations

_FIRST_GUESS = 0.6
"""Rate at which drafts are assumed to be accepted before any was seen: good ones soon show, bad ones cost little."""
_LEAST_WEIGHT = 1 / 8
"""Of the newest draft in the running rate: what was seen eight drafts ago is on its way out."""
_FIRST_PAUSE, _LONGEST_PAUSE = 32, 256
"""Rounds without a draft before one is tried again."""


class DraftLength:
    """Chooses the number of drafts that promises most tokens per time.

    With a rate a at which a draft is accepted behind accepted ones, and a draft that costs the share c of a round
    without drafts, k drafts give

        (1 + a + a^2 + ... + a^k) / (1 + c k)     tokens per time of such a round.

    If that is largest for k = 0, there is a pause, after which one draft tries again; pauses double as long as the
    tries fail. The choice depends on the request's own drafts alone, so its random tokens do not depend on the batch.
    """

    __slots__ = ("_cost", "_is_adaptive", "_limit", "_num_seen", "_pause", "_rate", "_rounds_left")

    def __init__(self, limit: int, cost: float, *, is_adaptive: bool) -> None:
        """Start with a guess.

        Args:
            limit: Drafts at most.
            cost: The share c.
            is_adaptive: False: always the limit.
        """
        self._limit = limit
        self._cost = cost
        self._is_adaptive = is_adaptive
        self._rate = _FIRST_GUESS
        self._num_seen = 0
        self._pause = _FIRST_PAUSE
        self._rounds_left = 0

    def choose(self) -> int:
        """Drafts of the next round; call it once a round."""
        if not self._is_adaptive:
            return self._limit
        if self._rounds_left > 0:
            self._rounds_left -= 1
            return 0 if self._rounds_left else 1
        best = self._best()
        if best == 0:
            self._rounds_left = self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            self._pause = _FIRST_PAUSE
        return best

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """Of so many drafts so many were accepted; those behind the first rejected one say nothing."""
        for is_accepted in [True] * num_accepted + [False] * (num_drafts > num_accepted):
            self._num_seen += 1
            weight = max(1 / (1 + self._num_seen), _LEAST_WEIGHT)
            self._rate += weight * (is_accepted - self._rate)

    def _best(self) -> int:
        best, best_gain, expected = 0, 1.0, 1.0
        for length in range(1, self._limit + 1):
            expected += self._rate**length
            gain = expected / (1.0 + self._cost * length)
            if gain > best_gain:
                best, best_gain = length, gain
        return best
