"""Proposes drafts: the draft model reads along with the target, then looks ahead of it."""

from __future__ import annotations

from collections.abc import Sequence

from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.speculative.config import SpeculativeConfig
from fastdeploy_dsa.engine.speculative.draft_length import DraftLength
from fastdeploy_dsa.engine.speculative.draft_runner import DraftRunner, LookAhead, Reading
from fastdeploy_dsa.engine.speculative.iterated_layer import IteratedLayer
from fastdeploy_dsa.engine.speculative.stacked_layers import StackedLayers
from fastdeploy_dsa.engine.speculative.state import DraftState, HiddenRows
from fastdeploy_dsa.engine.speculative.stats import SpeculativeStats
from fastdeploy_dsa.engine.step_inputs import BlockTables
from fastdeploy_dsa.engine.step_plan import MAX_UNDRAFTED, Chunk


class Proposer:
    """Gives requests their drafts."""

    def __init__(self, runner: DraftRunner, config: SpeculativeConfig, *, block_size: int) -> None:
        """Start without requests.

        Args:
            runner: The draft model.
            config: What the user asked for.
            block_size: Tokens of a cache block.
        """
        self._runner = runner
        self._config = config
        look_ahead = IteratedLayer if len(runner.layer_ids) == 1 else StackedLayers
        self._look_ahead: LookAhead = look_ahead(runner, block_size=block_size)
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

    def propose(self, chunks: Sequence[Chunk], hidden: object, tables: BlockTables) -> None:
        """Catch up with a step and give the requests whose next token it computed their drafts.

        Args:
            chunks: Of the step; new tokens are taken over, entries not yet committed.
            hidden: The target's hidden states of all rows of the step.
            tables: The scheduler's; they have blocks for the drafts.

        Raises:
            NonFiniteLogitsError: Of the draft model. No request gets drafts; what is caught up on will be again.
        """
        begin, readings = 0, []
        for chunk in chunks:
            _state(chunk.request).undrafted.append(HiddenRows(hidden, begin, begin + chunk.num_confirmed))
            begin += chunk.num_rows
            reading = self._reading(chunk)
            if reading.num_drafts or self._must_catch_up(chunk.request):
                readings.append(reading)
        if readings:
            drafts = self._look_ahead.draft(readings, tables)
            for reading in readings:
                _state(reading.request).keep_undrafted(self._num_unsettled(reading))
            for request, proposed in drafts.items():
                request.drafts = proposed

    def _reading(self, chunk: Chunk) -> Reading:
        request, num_drafts = chunk.request, 0
        end = request.num_computed + chunk.num_confirmed
        if chunk.is_last and request.finish_reason is None:
            num_drafts = min(_state(request).length.choose(), request.num_left - 1)
        return Reading(request, end - _state(request).num_undrafted, end, num_drafts)

    def _num_unsettled(self, reading: Reading) -> int:
        """Newest positions whose entries were made from drafts, or are missing, in one of the layers.

        The last of L layers makes those of position p from the token at p + L.
        """
        settled = min(reading.end, reading.request.num_tokens - len(self.layer_ids))
        return reading.end - max(reading.begin, settled)

    @staticmethod
    def _must_catch_up(request: Request) -> bool:
        """Rows of a request that ends are due as well: its blocks may serve others.

        One that gets no drafts is caught up on in groups of rows, which take hardly longer than one row.
        """
        return request.finish_reason is not None or _state(request).num_undrafted >= MAX_UNDRAFTED


def _state(request: Request) -> DraftState:
    assert request.draft_state is not None, "a request of an engine that drafts has a draft state"  # noqa: S101
    return request.draft_state
