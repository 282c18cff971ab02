"""Proposes drafts: the draft model reads along with the target, then runs ahead of it."""

# ruff: noqa: S101 - asserts here are for bugs of this file

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.runner import StepInputs, lines_of
from fastdeploy_dsa.engine.sampler import Purpose, most_likely, pick, token_weights, uniform
from fastdeploy_dsa.engine.speculative.acceptance import Draft
from fastdeploy_dsa.engine.speculative.config import SpeculativeConfig
from fastdeploy_dsa.engine.speculative.draft_length import DraftLength
from fastdeploy_dsa.engine.speculative.state import DraftState, HiddenRows
from fastdeploy_dsa.engine.speculative.stats import SpeculativeStats
from fastdeploy_dsa.engine.step_plan import Chunk

_MOST_UNDRAFTED = 32
"""A request that gets no drafts is caught up on in groups of rows, which take hardly longer than one row."""


class DraftOutputs(NamedTuple):
    """Of the rows whose logits were wanted.

    Attributes:
        logits: [R, vocab_size] float32.
        hidden: Their hidden states, R rows of the runner's own tensor.
        selection: What they selected if later iterations are to attend to the same; None: those select anew.
    """

    logits: npt.NDArray[np.float32]
    hidden: object
    selection: object | None


class DraftRunner(Protocol):
    """What the proposer needs of a draft model and its cache.

    Attributes:
        layer_ids: Absolute ids of its layers.
        cost: What a draft costs, as a share of the time of a step without drafts.
    """

    layer_ids: Sequence[int]
    cost: float

    def run(
        self,
        inputs: StepInputs,
        hidden: Sequence[HiddenRows],
        *,
        selection: object | None = None,
        selection_rows: Sequence[int] = (),
    ) -> DraftOutputs:
        """Run one iteration: write the rows' cache entries and predict the tokens two positions behind.

        Args:
            inputs: The rows; token_ids are those of the next position.
            hidden: Hidden states of the rows, in order: the target's, or those of an earlier iteration.
            selection: Of an earlier iteration, to be used instead of selecting anew.
            selection_rows: [rows of inputs], the row of selection that each is to use.
        """


class Proposer:
    """Gives requests their drafts.

    A step of the target computes positions c .. c' - 1 of a request, c' is the place of its newest token. Then

        iteration 0       reads positions c .. c' - 1, each with the token behind it, and predicts the token at c' + 1
        iteration j >= 1  reads position c' - 1 + j with draft j, and predicts the token at c' + 1 + j

    Entries that iterations from 1 on write are guesses; iteration 0 of the next round overwrites those positions.
    """

    def __init__(self, runner: DraftRunner, config: SpeculativeConfig, *, block_size: int) -> None:
        """Start without requests.

        Args:
            runner: The draft model.
            config: What the user asked for.
            block_size: Tokens of a cache block.
        """
        self._runner = runner
        self._config = config
        self._block_size = block_size
        self.stats = SpeculativeStats()

    @property
    def layer_ids(self) -> Sequence[int]:
        """Layers whose cache the draft model writes."""
        return self._runner.layer_ids

    def add(self, request: Request) -> None:
        """Draft for a request from now on."""
        length = DraftLength(self._config.num_speculative_tokens, self._runner.cost, is_adaptive=self._config.adaptive)
        request.draft_state = DraftState(length)

    def observe(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        """A request's drafts have been computed by the target."""
        self.stats.observe(num_drafts, num_accepted)
        _state(request).length.observe(num_drafts, num_accepted)

    def propose(self, chunks: Sequence[Chunk], hidden: object, block_table: npt.NDArray[np.int32]) -> None:
        """Catch up with a step and give the requests whose next token it computed their drafts.

        Args:
            chunks: Of the step; new tokens are taken over, entries not yet committed.
            hidden: The target's hidden states of all rows of the step.
            block_table: The scheduler's; has blocks for the drafts.

        Raises:
            NonFiniteLogitsError: Of the draft model. No request gets drafts; what is caught up on will be again.
        """
        begin = 0
        lengths: dict[Request, int] = {}
        for chunk in chunks:
            request = chunk.request
            _state(request).undrafted.append(HiddenRows(hidden, begin, begin + chunk.num_confirmed))
            begin += chunk.num_rows
            if chunk.is_last and request.finish_reason is None:
                length = min(_state(request).length.choose(), request.num_left - 1)
                if length > 0:
                    lengths[request] = length
        computed = {chunk.request: chunk.request.num_computed + chunk.num_confirmed for chunk in chunks}
        behind = [request for request in computed if request in lengths or self._must_catch_up(request)]
        if behind:
            self._draft(behind, computed, lengths, block_table)

    @staticmethod
    def _must_catch_up(request: Request) -> bool:
        """Rows of a request that ends are due as well: its blocks may serve others."""
        return request.finish_reason is not None or _state(request).num_undrafted >= _MOST_UNDRAFTED

    def _draft(
        self,
        behind: Sequence[Request],
        computed: dict[Request, int],
        lengths: dict[Request, int],
        block_table: npt.NDArray[np.int32],
    ) -> None:
        spans = {request: (computed[request] - _state(request).num_undrafted, computed[request]) for request in behind}
        rows = [rows for request in behind for rows in _state(request).undrafted]
        outputs = self._runner.run(self._inputs_behind(spans, lengths, block_table), rows)
        drafts: dict[Request, list[Draft]] = {request: [] for request in behind if request in lengths}
        drafting, first = list(drafts), outputs
        while drafting:
            for place, request in enumerate(drafting):
                position = request.num_tokens + len(drafts[request])
                drafts[request].append(_choose(outputs.logits, place, request, position))
            ahead = [request for request in drafting if len(drafts[request]) < lengths[request]]
            if ahead:
                places = [drafting.index(request) for request in ahead]
                outputs = self._runner.run(
                    self._inputs_ahead(ahead, drafts, block_table),
                    [HiddenRows(outputs.hidden, place, place + 1) for place in places],
                    selection=first.selection,
                    selection_rows=[list(drafts).index(request) for request in ahead],
                )
            drafting = ahead
        for request in behind:
            _state(request).undrafted.clear()
        for request, proposed in drafts.items():
            request.drafts = proposed

    def _inputs_behind(
        self,
        spans: dict[Request, tuple[int, int]],
        lengths: dict[Request, int],
        block_table: npt.NDArray[np.int32],
    ) -> StepInputs:
        """Rows of iteration 0; logits of the last row of every request that gets drafts."""
        counts = [end - begin for begin, end in spans.values()]
        ends = np.cumsum(counts)
        wanted = [request in lengths for request in spans]
        return StepInputs.of_rows(
            token_ids=np.concatenate([request.tokens[begin + 1 : end + 1] for request, (begin, end) in spans.items()]),
            positions=np.concatenate([np.arange(begin, end) for begin, end in spans.values()]),
            request_ids=np.repeat(np.arange(len(spans)), counts),
            block_table=lines_of(list(spans), block_table),
            logits_rows=ends[wanted] - 1,
            block_size=self._block_size,
        )

    def _inputs_ahead(
        self, ahead: Sequence[Request], drafts: dict[Request, list[Draft]], block_table: npt.NDArray[np.int32]
    ) -> StepInputs:
        """Rows of a later iteration: one per request, with its newest draft."""
        rows = np.arange(len(ahead))
        return StepInputs.of_rows(
            token_ids=np.array([drafts[request][-1].token for request in ahead]),
            positions=np.array([request.num_tokens - 2 + len(drafts[request]) for request in ahead]),
            request_ids=rows,
            block_table=lines_of(ahead, block_table),
            logits_rows=rows,
            block_size=self._block_size,
        )


def _choose(logits: npt.NDArray[np.float32], place: int, request: Request, position: int) -> Draft:
    """The draft for a position: as the target would choose, from the draft model's logits."""
    (best,) = most_likely(logits[place : place + 1])
    if request.params.temperature == 0.0:
        return Draft(best)
    weights = token_weights(logits[place], request.params)
    distribution = weights / weights.sum()
    return Draft(pick(distribution, uniform(request.random_key, position, Purpose.DRAFT)), distribution)


def _state(request: Request) -> DraftState:
    assert request.draft_state is not None, "a request of an engine that drafts has a draft state"
    return request.draft_state
