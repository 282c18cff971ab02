"""Runs the package's target and draft model side by side over one paged, poisoned cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import paddle

from fastdeploy_dsa.models import DeepseekV32ForCausalLM, MtpModel
from fastdeploy_dsa.ops import CacheFormat, IndexSelection
from fastdeploy_dsa.step import StepMetadata
from tests.kit.reference_model import Numbers, Scaled
from tests.kit.serving import BLOCK_SIZE, Plan, Serving, Span, poisoned, recording


class Drafted(NamedTuple):
    """What the draft layer did for one request: logits [T, vocab], hidden [T, hidden], and the layer's records.

    positions [T, index_topk]; index_scores [T, T]; attn_heads [T, heads, v]; attn_out [T, hidden]; target_hidden
    [T, hidden] is what it was given.
    """

    logits: np.ndarray
    hidden: np.ndarray
    target_hidden: np.ndarray
    positions: np.ndarray
    index_scores: np.ndarray
    attn_heads: np.ndarray
    attn_out: np.ndarray
    numbers: Numbers


class _LayersOf:
    """A draft model as `recording` looks at a model."""

    def __init__(self, draft: MtpModel) -> None:
        self.layers = [draft.layer]


class DraftServing(Serving):
    """Sequences have one token more than is processed: the row of the last position needs its next token."""

    def __init__(
        self,
        models: tuple[DeepseekV32ForCausalLM, MtpModel],
        sequences: Sequence[np.ndarray],
        *,
        cache_format: CacheFormat = "float32",
    ) -> None:
        model, self.draft = models
        super().__init__(model, [sequence[:-1] for sequence in sequences], cache_format=cache_format)
        self.next_tokens = [np.asarray(sequence[1:], np.int64) for sequence in sequences]
        num_blocks = next(iter(self.caches.values())).shape[0]
        offset = self.draft.layer_id
        created = self.backend.create_kv_cache(num_layers=1, num_blocks=num_blocks, layer_offset=offset)
        self.caches |= {key: poisoned(cache) for key, cache in created.items()}

    def draft_step(self, spans: Sequence[Span]) -> StepMetadata:
        return StepMetadata.build(
            token_ids=np.concatenate([self.next_tokens[s.request][s.begin : s.end] for s in spans]),
            positions=np.concatenate([np.arange(s.begin, s.end, dtype=np.int32) for s in spans]),
            request_ids=np.concatenate([np.full(s.end - s.begin, s.request, np.int32) for s in spans]),
            block_table=self.block_table,
            block_size=BLOCK_SIZE,
        )

    def target_hidden(self, spans: Sequence[Span]) -> paddle.Tensor:
        return self.model.forward(step=self.step(spans), attn_backend=self.backend, caches=self.caches)

    def iterate(
        self, step: StepMetadata, hidden: paddle.Tensor, selection: IndexSelection | None = None
    ) -> tuple[paddle.Tensor, IndexSelection]:
        return self.draft.forward(
            step=step, hidden=hidden, attn_backend=self.backend, caches=self.caches, selection=selection
        )

    def draft_logits(self, plan: Plan) -> list[np.ndarray]:
        """Logits [T, vocab] of the draft layer, by request."""
        logits = []
        for spans in plan:
            hidden, _ = self.iterate(self.draft_step(spans), self.target_hidden(spans))
            logits.append(self.draft.compute_logits(hidden).numpy())
        return [np.concatenate(logits)[rows] for rows in self._rows_of_requests(plan)]

    def run_drafted(self, plan: Plan) -> list[Drafted]:
        """The same with everything on the way."""
        recorded: dict[str, list[Any]] = {}
        for spans in plan:
            step, given = self.draft_step(spans), self.target_hidden(spans)
            with recording(_LayersOf(self.draft)) as records:  # type: ignore[arg-type]
                hidden, selection = self.iterate(step, given)
            of_step = {name: by_layer[0] for name, by_layer in records.items() if 0 in by_layer}
            of_step |= {"hidden": hidden.numpy(), "target_hidden": given.numpy()}
            of_step |= {
                "logits": self.draft.compute_logits(hidden).numpy(),
                "positions": selection.positions.numpy(),
            }
            for name, rows in of_step.items():
                recorded.setdefault(name, []).append(rows[: step.num_tokens])
        width = max(scores.shape[1] for scores in recorded["index_scores"])
        recorded["index_scores"] = [
            np.pad(scores, ((0, 0), (0, width - scores.shape[1])), constant_values=np.nan)
            for scores in recorded["index_scores"]
        ]
        gathered = {name: np.concatenate(parts) for name, parts in recorded.items()}
        return [self._drafted(request, rows, gathered) for request, rows in enumerate(self._rows_of_requests(plan))]

    def _drafted(self, request: int, rows: np.ndarray, gathered: dict[str, np.ndarray]) -> Drafted:

        own = {name: values[rows] for name, values in gathered.items()}
        query = Scaled(own["query_numbers"], own["query_scale"])
        return Drafted(
            logits=own["logits"],
            hidden=own["hidden"],
            target_hidden=own["target_hidden"],
            positions=own["positions"],
            index_scores=own["index_scores"][:, : len(rows)],
            attn_heads=own["attn_heads"],
            attn_out=own["attn_out"],
            numbers=self._numbers(request, self.draft.layer_id, query),
        )
