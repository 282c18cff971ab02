"""Runs an MTP model over its own cache, next to the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from fastdeploy_dsa.attention.backend import AttentionBackend
from fastdeploy_dsa.engine.speculative.draft_runner import DraftOutputs
from fastdeploy_dsa.engine.speculative.state import HiddenRows
from fastdeploy_dsa.engine.step_inputs import StepInputs
from fastdeploy_dsa.models import DraftModel
from fastdeploy_dsa.ops import IndexSelection

_COST_OF_VERIFYING = 0.075
"""Of a draft, as a share of a step without drafts: 0 where rows are filled up anyway, up to 0.3 in larger batches.

One number for all, because random tokens depend on the number of drafts, and must not depend on the batch.
"""
_NO_LOGITS = np.empty((0, 0), np.float32)


class MtpRunner:
    """A DraftRunner.

    Attributes:
        layer_ids: The MTP layers'.
        cost: One layer as a share of the target's, and a row to verify.
    """

    def __init__(
        self,
        models: Sequence[DraftModel],
        attn_backend: AttentionBackend,
        caches: Mapping[tuple[str, int], Tensor],
        *,
        block_size: int,
    ) -> None:
        """Put the parts together.

        Args:
            models: One per MTP layer, in their order.
            attn_backend: The target's, which knows draft layers too.
            caches: Cache tensors by (role, layer id).
            block_size: Tokens of a cache block.
        """
        self._models = models
        self._attn_backend: Any = attn_backend  # the one that the models were made for
        self._caches = caches
        self._block_size = block_size
        self._shares_selection = models[0].shares_selection and len(models) == 1
        self.layer_ids: Sequence[int] = [model.layer_id for model in models]
        self.cost = 1.0 / models[0].config.num_hidden_layers + _COST_OF_VERIFYING

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
        """As DraftRunner.run; rows of which nothing is wanted only write their entries."""
        model, joined, asking = self._models[layer], _joined(hidden), inputs.logits_rows
        wanted = asking if hidden_rows is None else hidden_rows
        backend, caches = self._attn_backend, self._caches
        with paddle.no_grad():
            if len(wanted) < len(inputs.token_ids):
                step = inputs.metadata(self._block_size)
                model.write_entries(step=step, hidden=joined, attn_backend=backend, caches=caches)
                if len(wanted) == 0:
                    return DraftOutputs(_NO_LOGITS, joined[:0], None)
                inputs, joined = inputs.only(wanted), paddle.index_select(joined, paddle.to_tensor(wanted))
            step, given = inputs.metadata(self._block_size), None
            if selection is not None:
                assert isinstance(selection, IndexSelection), "it is of an earlier call"  # noqa: S101
                given = compact_selection(selection, np.asarray(selection_rows), num_rows=step.num_rows)
            normed, used = model.forward(
                step=step, hidden=joined, attn_backend=backend, caches=caches, selection=given
            )
            logits = self._logits(model, normed, np.searchsorted(wanted, asking))
        # Where selections are shared, the rows of iteration 0 that got this far are the last accepted ones.
        return DraftOutputs(logits, normed, used if self._shares_selection else None)

    @staticmethod
    def _logits(model: DraftModel, normed: Tensor, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        if len(rows) == 0:
            return _NO_LOGITS
        asking = normed if len(rows) == normed.shape[0] else paddle.index_select(normed, paddle.to_tensor(rows))
        logits: npt.NDArray[np.float32] = model.compute_logits(asking).numpy()
        return logits


def compact_selection(selection: IndexSelection, rows: npt.NDArray[np.int64], *, num_rows: int) -> IndexSelection:
    """Some rows of a selection, in new tensors (rules S19, S20).

    Args:
        selection: The source.
        rows: [R], what the result's rows are.
        num_rows: Of the result, at least R; the rest is padding, which selects nothing.
    """
    fill = num_rows - len(rows)
    place = paddle.to_tensor(rows)
    positions, slot_ids, counts = (paddle.index_select(part, place) for part in selection)
    if not fill:
        return IndexSelection(positions, slot_ids, counts)
    empty = paddle.full([fill, positions.shape[1]], -1, dtype=positions.dtype)
    return IndexSelection(
        positions=paddle.concat([positions, empty]),
        slot_ids=paddle.concat([slot_ids, empty]),
        counts=paddle.concat([counts, paddle.zeros([fill], dtype=counts.dtype)]),
    )


def _joined(hidden: Sequence[HiddenRows]) -> Tensor:
    pieces = [rows.tensor[rows.begin : rows.end] for rows in hidden]
    return pieces[0] if len(pieces) == 1 else paddle.concat(pieces)
