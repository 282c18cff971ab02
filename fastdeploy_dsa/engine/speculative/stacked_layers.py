"""Looks ahead with several layers, each of which was trained to look one token further."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.speculative.draft_runner import (
    DraftOutputs,
    DraftRunner,
    Drafts,
    Reading,
    choose_draft,
    undrafted_rows,
)
from fastdeploy_dsa.engine.speculative.state import HiddenRows
from fastdeploy_dsa.engine.step_inputs import BlockTables, StepInputs


class _Span(NamedTuple):
    """Rows begin .. end - 1 of a request in one layer, and the row of the layer's run in which they start."""

    request: Request
    begin: int
    end: int
    first_row: int


class StackedLayers:
    """A LookAhead for checkpoints with several layers; drafts are as many as there are layers at most.

    The row of position p joins, in layer k = 0, 1, ..., layer k - 1's hidden state of the same position (the target's
    in layer 0) with the token at p + 1 + k, and predicts the token at p + 2 + k. So layer k's last rows are made from
    drafts 1 .. k, and are guesses; the next round, which knows the tokens, writes them again.

    Source: DeepSeek-V3 technical report, section 2.2.
    """

    def __init__(self, runner: DraftRunner, *, block_size: int) -> None:
        """Keep the layers' runner and the tokens of a cache block."""
        self._runner = runner
        self._block_size = block_size

    def draft(self, readings: Sequence[Reading], tables: BlockTables) -> Drafts:
        """As LookAhead.draft."""
        drafts: Drafts = {reading.request: [] for reading in readings if reading.num_drafts}
        hidden = [rows for reading in readings for rows in undrafted_rows(reading.request)]
        spans, last = self._spans(readings, drafts, 0), len(self._runner.layer_ids) - 1
        for layer in range(last + 1):
            if not spans:
                break
            asking = [reading.request for reading in readings if layer < reading.num_drafts]
            inputs = self._inputs(spans, drafts, layer, asking, tables)
            feeds_next = np.arange(len(inputs.token_ids)) if layer < last else None
            outputs = self._runner.run(inputs, hidden, layer=layer, hidden_rows=feeds_next)
            for place, request in enumerate(asking):
                drafts[request].append(choose_draft(outputs.logits[place], request, request.num_tokens + layer))
            above, spans = spans, self._spans(readings, drafts, layer + 1)
            hidden = self._rows_of(spans, above, outputs)
        return drafts

    @staticmethod
    def _spans(readings: Sequence[Reading], drafts: Drafts, layer: int) -> list[_Span]:
        """The positions whose token layer + 1 further on is known or drafted."""
        spans, first_row = [], 0
        for request, begin, end, _ in readings:
            num_tokens = request.num_tokens + len(drafts.get(request, ()))
            end = min(end, num_tokens - 1 - layer)  # noqa: PLW2901
            if begin < end:
                spans.append(_Span(request, begin, end, first_row))
                first_row += end - begin
        return spans

    @staticmethod
    def _rows_of(spans: Sequence[_Span], above: Sequence[_Span], outputs: DraftOutputs) -> list[HiddenRows]:
        """Where the spans' positions stand in the run of the layer before."""
        first_rows = {span.request: span.first_row for span in above}
        starts = [first_rows[span.request] for span in spans]
        return [
            HiddenRows(outputs.hidden, start, start + span.end - span.begin)
            for start, span in zip(starts, spans, strict=True)
        ]

    def _inputs(
        self,
        spans: Sequence[_Span],
        drafts: Drafts,
        layer: int,
        asking: Sequence[Request],
        tables: BlockTables,
    ) -> StepInputs:
        """Rows of a layer; logits of the last row of every request that asks for a draft of it."""
        tokens = []
        for request, begin, end, _ in spans:
            proposed = np.array([draft.token for draft in drafts.get(request, ())], np.int64)
            first, behind = begin + 1 + layer, end + 1 + layer
            tokens.append(request.tokens[first : min(behind, request.num_tokens)])
            tokens.append(proposed[max(0, first - request.num_tokens) : max(0, behind - request.num_tokens)])
        counts = [span.end - span.begin for span in spans]
        ends = np.cumsum(counts)
        return StepInputs.of_rows(
            token_ids=np.concatenate(tokens),
            positions=np.concatenate([np.arange(span.begin, span.end) for span in spans]),
            request_ids=np.repeat(np.arange(len(spans)), counts),
            tables=tables.of([span.request for span in spans]),
            logits_rows=ends[[span.request in asking for span in spans]] - 1,
            block_size=self._block_size,
        )
