"""A draft model that is only its cache: every row it has ever to look at must hold the token behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cache_manager import TensorKey
from fastdeploy_dsa.engine.speculative.draft_runner import DraftOutputs
from fastdeploy_dsa.engine.speculative.state import HiddenRows
from fastdeploy_dsa.engine.step_inputs import StepInputs
from tests.engine.window_fakes import write_and_check_windows

VOCAB_SIZE = 50
NUM_LAYERS = 2

Drafts = Callable[[npt.NDArray[np.int64], npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""From the tokens before and the target's logits behind them to the draft model's."""


def next_logits(tokens: np.ndarray) -> np.ndarray:
    """Random logits that depend on every token before."""
    seed = np.concatenate([[len(tokens)], tokens]).tolist()
    return np.random.default_rng(seed).standard_normal(VOCAB_SIZE).astype(np.float32)


def always_right(tokens: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return logits


def always_wrong(tokens: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Another token is the likeliest, and the target's hardly possible."""
    return -logits


def at_times_right(tokens: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return logits if int(tokens.sum()) % 3 else -logits


class Drafting(NamedTuple):
    """What make_core needs to know of it."""

    num_speculative_tokens: int
    drafts: Drafts = at_times_right
    adaptive: bool = True


class Recycled(NamedTuple):
    """Stands for hidden states of this model: the positions they belong to."""

    positions: npt.NDArray[np.int32]


class DraftCall(NamedTuple):
    """An iteration: its rows, and whether they came with hidden states of the target."""

    inputs: StepInputs
    follows_target: bool


class CacheDrafter:
    """A DraftRunner over the draft group of a CacheModel's caches.

    The row of position p stores the token at p + 1. So the row before it must store the token of position p, which the
    target's cache has: whatever was never written, or belongs to rejected drafts or to another request, is found.

    Attributes:
        calls: Every iteration so far.
    """

    layer_ids = (NUM_LAYERS,)
    cost = 0.125

    def __init__(
        self, caches: Mapping[TensorKey, npt.NDArray[np.int64]], block_size: int, drafts: Drafts = at_times_right
    ) -> None:
        self._caches = caches
        self._target, self._own = caches["tokens", 0], caches["tokens", NUM_LAYERS]
        self._block_size = block_size
        self._drafts = drafts
        self.calls: list[DraftCall] = []

    def run(
        self,
        inputs: StepInputs,
        hidden: Sequence[HiddenRows],
        *,
        layer: int = 0,
        hidden_rows: npt.NDArray[np.int64] | None = None,
        selection: object | None = None,
        selection_rows: Sequence[int] = (),
    ) -> DraftOutputs:
        follows_target = self._check_hidden(inputs, hidden)
        self.calls.append(DraftCall(inputs, follows_target))
        blocks = inputs.block_table[inputs.request_ids, inputs.positions // self._block_size]
        assert (blocks >= 0).all(), "a draft row has no block"
        slots = blocks.astype(np.int64) * self._block_size + inputs.positions % self._block_size
        assert len(set(slots.tolist())) == len(slots), "two draft rows share a slot"
        self._own.reshape(-1)[slots] = inputs.token_ids
        write_and_check_windows(self._caches, inputs, NUM_LAYERS, self._own)
        known = [self._tokens(inputs, row, follows_target) for row in inputs.logits_rows]
        logits = [self._drafts(tokens, next_logits(tokens)) for tokens in known]
        return DraftOutputs(
            np.array(logits, np.float32).reshape(-1, VOCAB_SIZE), Recycled(inputs.positions[inputs.logits_rows]), None
        )

    @staticmethod
    def _check_hidden(inputs: StepInputs, hidden: Sequence[HiddenRows]) -> bool:
        """Hidden states are the target's of the same position, or this model's of the one before."""
        kinds = {type(rows.tensor) for rows in hidden}
        assert kinds in ({StepInputs}, {Recycled}), kinds
        positions = np.concatenate([rows.tensor.positions[rows.begin : rows.end] for rows in hidden])
        assert np.array_equal(positions + (kinds == {Recycled}), inputs.positions)
        return kinds == {StepInputs}

    def _tokens(self, inputs: StepInputs, row: int, follows_target: bool) -> npt.NDArray[np.int64]:
        """All tokens up to the one behind the row's position."""
        position = int(inputs.positions[row])
        blocks = inputs.block_table[inputs.request_ids[row], : -(-(position + 1) // self._block_size)]
        own = self._own[blocks].reshape(-1)[: position + 1]
        target = self._target[blocks].reshape(-1)[: position + 1]
        if follows_target:
            assert np.array_equal(own[:-1], target[1:]), "draft entries that do not belong to the request's tokens"
        return np.concatenate([target[:1], own])
