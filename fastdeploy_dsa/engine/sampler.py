"""From logits to tokens, in float64 on the host: a few rows a step."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastdeploy_dsa.engine.outputs import TokenLogprob
from fastdeploy_dsa.engine.sampling_params import SamplingParams

FloatArray = npt.NDArray[np.float64]


class Purpose(IntEnum):
    """What a random number is for; numbers of different purposes are independent (rule S32)."""

    ACCEPT = 0
    TOKEN = 1
    DRAFT = 2


class SamplingRow(NamedTuple):
    """What is needed to choose one token.

    Attributes:
        params: Of the request.
        random_key: Of the request.
        position: Place of the token to be chosen in its request, the prompt included.
    """

    params: SamplingParams
    random_key: tuple[int, int]
    position: int


class NonFiniteLogitsError(ArithmeticError):
    """The largest logit of a row is not a finite number."""


# float32 logits that differ at all differ by 1e-45 or more, so nothing colder is different.
_TINY_TEMPERATURE = 1e-60
# Philox 4x64-10: multipliers, and what the key grows by every round.
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_WORD = (1 << 64) - 1


def uniform(random_key: tuple[int, int], position: int, purpose: Purpose) -> float:
    """A random number in [0, 1) that depends on the arguments alone: counter-based, not drawn from a stream.

    Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (2011). The same bits as
    `numpy.random.Philox(key=random_key, counter=[position, purpose, 0, 0])`, whose construction costs more than this.
    """
    key0, key1 = random_key
    word0, word1, word2, word3 = position + 1, int(purpose), 0, 0
    for _ in range(_ROUNDS):
        left, right = _MULTIPLIERS[0] * word0, _MULTIPLIERS[1] * word2
        word0, word1, word2, word3 = (
            (right >> 64) ^ word1 ^ key0,
            right & _WORD,
            (left >> 64) ^ word3 ^ key1,
            left & _WORD,
        )
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return (word0 >> 11) * 2.0**-53  # a float64 has 53 bits


def sample(logits: npt.NDArray[np.float32], rows: Sequence[SamplingRow]) -> list[int]:
    """Choose one token per row; a row's token does not depend on the other rows.

    Args:
        logits: [len(rows), vocab_size] float32.
        rows: One per row of logits.

    Raises:
        NonFiniteLogitsError: A row holds NaN or +inf, or nothing but -inf.
    """
    tokens = most_likely(logits)
    for index, (params, random_key, position) in enumerate(rows):
        if params.temperature > 0.0:
            tokens[index] = pick(token_weights(logits[index], params), uniform(random_key, position, Purpose.TOKEN))
    return tokens


def most_likely(logits: npt.NDArray[np.float32]) -> list[int]:
    """The token with the largest logit of every row, the smallest id of equals.

    Raises:
        NonFiniteLogitsError: A row holds NaN or +inf, or nothing but -inf.
    """
    best = logits.argmax(axis=1)  # the first of equals is the smallest id; a NaN counts as the largest
    largest = logits[np.arange(len(logits)), best]
    if not np.isfinite(largest).all():
        raise NonFiniteLogitsError(f"the largest of the model's logits is {largest[~np.isfinite(largest)][0]}")
    tokens: list[int] = best.tolist()
    return tokens


def pick(weights: FloatArray, number: float) -> int:
    """The token at which the running sum of weights first exceeds number * sum; never one of weight 0.

    Args:
        weights: [vocab_size], 0 or more, not all 0.
        number: In [0, 1).
    """
    sums = weights.cumsum()
    token = int(sums.searchsorted(number * sums[-1], side="right"))
    # number * sum may round up to sum.
    return token if token < len(sums) else int(np.flatnonzero(weights)[-1])


def token_weights(logits: npt.NDArray[np.float32], params: SamplingParams) -> FloatArray:
    """Unnormalised probabilities after temperature, then min_p, top_k and top_p.

    Args:
        logits: [vocab_size] float32, the largest finite.
        params: temperature above 0.

    Returns:
        [vocab_size]; the largest is 1, tokens that a filter dropped have 0.
    """
    wide = logits.astype(np.float64)
    # A tiny temperature would take the others to -inf by an overflow; exp is 0 from -746 on.
    weights: FloatArray = np.exp((wide - wide.max()) / max(params.temperature, _TINY_TEMPERATURE))
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0  # the largest weight is 1
    if 0 < params.top_k < len(weights):
        _keep_top_k(weights, params.top_k)
    if params.top_p < 1.0:
        _keep_top_p(weights, params.top_p)
    return weights


def _keep_top_k(weights: FloatArray, count: int) -> None:
    """Set all but the count largest to 0; of equal ones the smaller ids stay."""
    threshold = np.partition(weights, -count)[-count]
    above = weights > threshold
    equal = np.flatnonzero(weights == threshold)
    dropped = ~above
    dropped[equal[: count - np.count_nonzero(above)]] = False
    weights[dropped] = 0.0


def _keep_top_p(weights: FloatArray, top_p: float) -> None:
    """Keep the fewest largest whose sum is top_p of the whole or more; of equal ones the smaller ids come first."""
    order = (-weights).argsort(kind="stable")
    sums = weights[order].cumsum()
    last = int(sums.searchsorted(top_p * sums[-1], side="left"))
    weights[order[last + 1 :]] = 0.0


def top_logprobs(logits: npt.NDArray[np.float32], token: int, count: int) -> dict[int, TokenLogprob]:
    """Log-probabilities of the count most likely tokens and of the chosen one, most likely first.

    Args:
        logits: [vocab_size] float32.
        token: The chosen token.
        count: 0 .. vocab_size; equal ones rank by id.
    """
    wide = logits.astype(np.float64)
    largest = wide.max()
    logprobs = wide - largest - np.log(np.exp(wide - largest).sum())
    order = _largest(logprobs, count)
    chosen = logprobs[token]
    rank = 1 + int(np.count_nonzero(logprobs > chosen)) + int(np.count_nonzero(logprobs[:token] == chosen))
    entries = {int(other): TokenLogprob(float(logprobs[other]), place) for place, other in enumerate(order, 1)}
    entries.setdefault(token, TokenLogprob(float(chosen), rank))
    return entries


def _largest(values: FloatArray, count: int) -> npt.NDArray[np.int64]:
    if count == 0:
        return np.empty(0, np.int64)
    candidates = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]
