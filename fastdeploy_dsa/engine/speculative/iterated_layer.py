"""Looks ahead with one layer, which is fed with its own results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.speculative.draft_runner import (
    DraftRunner,
    Drafts,
    Reading,
    choose_draft,
    undrafted_rows,
)
from fastdeploy_dsa.engine.speculative.state import HiddenRows
from fastdeploy_dsa.engine.step_inputs import BlockTables, StepInputs


class IteratedLayer:
    """A LookAhead for checkpoints with one layer.

    The target has computed positions .. c' - 1 of a request, c' is the place of its newest token. Then

        iteration 0       reads positions c .. c' - 1, each with the token behind it, and predicts the token at c' + 1
        iteration j >= 1  reads position c' - 1 + j with draft j, and predicts the token at c' + 1 + j

    Entries that iterations from 1 on write are guesses; iteration 0 of the next round overwrites those positions.
    """

    def __init__(self, runner: DraftRunner, *, block_size: int) -> None:
        """Keep the layer's runner and the tokens of a cache block."""
        self._runner = runner
        self._block_size = block_size

    def draft(self, readings: Sequence[Reading], tables: BlockTables) -> Drafts:
        """As LookAhead.draft."""
        rows = [rows for reading in readings for rows in undrafted_rows(reading.request)]
        outputs = self._runner.run(self._inputs_behind(readings, tables), rows)
        wanted = {reading.request: reading.num_drafts for reading in readings if reading.num_drafts}
        drafts: Drafts = {request: [] for request in wanted}
        drafting, first = list(drafts), outputs
        while drafting:
            for place, request in enumerate(drafting):
                position = request.num_tokens + len(drafts[request])
                drafts[request].append(choose_draft(outputs.logits[place], request, position))
            ahead = [request for request in drafting if len(drafts[request]) < wanted[request]]
            if ahead:
                places = [drafting.index(request) for request in ahead]
                outputs = self._runner.run(
                    self._inputs_ahead(ahead, drafts, tables),
                    [HiddenRows(outputs.hidden, place, place + 1) for place in places],
                    selection=first.selection,
                    selection_rows=[list(drafts).index(request) for request in ahead],
                )
            drafting = ahead
        return drafts

    def _inputs_behind(self, readings: Sequence[Reading], tables: BlockTables) -> StepInputs:
        """Rows of iteration 0; logits of the last row of every request that gets drafts."""
        counts = [reading.end - reading.begin for reading in readings]
        ends = np.cumsum(counts)
        is_wanted = [reading.num_drafts > 0 for reading in readings]
        return StepInputs.of_rows(
            token_ids=np.concatenate(
                [request.tokens[begin + 1 : end + 1] for request, begin, end, _ in readings],
            ),
            positions=np.concatenate([np.arange(begin, end) for _, begin, end, _ in readings]),
            request_ids=np.repeat(np.arange(len(readings)), counts),
            tables=tables.of([reading.request for reading in readings]),
            logits_rows=ends[is_wanted] - 1,
            block_size=self._block_size,
        )

    def _inputs_ahead(self, ahead: Sequence[Request], drafts: Drafts, tables: BlockTables) -> StepInputs:
        """Rows of a later iteration: one per request, with its newest draft."""
        rows = np.arange(len(ahead))
        return StepInputs.of_rows(
            token_ids=np.array([drafts[request][-1].token for request in ahead]),
            positions=np.array([request.num_tokens - 2 + len(drafts[request]) for request in ahead]),
            request_ids=rows,
            tables=tables.of(ahead),
            logits_rows=rows,
            block_size=self._block_size,
        )
