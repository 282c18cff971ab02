"""Which drafts are kept, and which token follows them: the target's distribution is met exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastdeploy_dsa.engine.sampler import (
    FloatArray,
    Purpose,
    SamplingRow,
    most_likely,
    pick,
    token_weights,
    uniform,
)


class Draft(NamedTuple):
    """A proposed token.

    Attributes:
        token: The proposal.
        distribution: [vocab_size], sums to 1, the one the token was really sampled from; None: it was chosen, not
            sampled.
    """

    token: int
    distribution: FloatArray | None = None


def accept(
    logits: npt.NDArray[np.float32], rows: Sequence[SamplingRow], drafts: Sequence[Sequence[Draft]]
) -> list[list[int]]:
    """The tokens that follow for each request: accepted drafts, and one that is the target's own.

    Without drafts this is `sample`. What a request gets does not depend on the other requests.

    Args:
        logits: [R, vocab_size] float32: of each request, a row behind its newest token and one behind each draft.
        rows: One per request; position is that of the first token to be chosen.
        drafts: The same requests' drafts.

    Raises:
        NonFiniteLogitsError: As sample.
    """
    best = most_likely(logits)
    accepted, begin = [], 0
    for row, proposed in zip(rows, drafts, strict=True):
        end = begin + 1 + len(proposed)
        if row.params.temperature > 0.0:
            accepted.append(_sampled(logits[begin:end], row, proposed))
        else:
            accepted.append(_greedy(best[begin:end], proposed))
        begin = end
    return accepted


def _greedy(best: list[int], drafts: Sequence[Draft]) -> list[int]:
    """Drafts as long as they are what the target finds most likely (rule S27)."""
    tokens = [draft.token for draft in drafts]
    num_accepted = next((place for place, token in enumerate(tokens) if token != best[place]), len(tokens))
    return best[: num_accepted + 1]


def _sampled(logits: npt.NDArray[np.float32], row: SamplingRow, drafts: Sequence[Draft]) -> list[int]:
    """Rejection sampling: a token at a position has the target's distribution whoever drafted it (rule S29).

    Source: Leviathan, Kalman, Matias: Fast inference from transformers via speculative decoding (2023).
    """
    tokens: list[int] = []
    for target, draft in zip(logits, drafts, strict=False):
        position = row.position + len(tokens)
        weights = token_weights(target, row.params)
        wanted = weights / weights.sum()
        proposed = 1.0 if draft.distribution is None else draft.distribution[draft.token]
        if not uniform(row.random_key, position, Purpose.ACCEPT) * proposed < wanted[draft.token]:
            return [*tokens, pick(_residual(wanted, draft), uniform(row.random_key, position, Purpose.TOKEN))]
        tokens.append(draft.token)
    weights = token_weights(logits[-1], row.params)
    return [*tokens, pick(weights, uniform(row.random_key, row.position + len(tokens), Purpose.TOKEN))]


def _residual(wanted: FloatArray, draft: Draft) -> FloatArray:
    """What the target wants more often than the draft model proposes it; unnormalised."""
    if draft.distribution is None:
        residual = wanted.copy()
        residual[draft.token] = 0.0
    else:
        residual = np.maximum(wanted - draft.distribution, 0.0)
    return residual if residual.any() else wanted  # equal up to rounding: a rejection that should not have been
