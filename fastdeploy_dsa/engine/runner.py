"""Runs the model over the rows of a step and brings the wanted logits to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from fastdeploy_dsa.engine.decode_graphs import DecodeGraphs, DecodeLimits, Graph
from fastdeploy_dsa.engine.step_inputs import StepInputs
from fastdeploy_dsa.ops import IndexSelection
from fastdeploy_dsa.step import StepMetadata


class StepOutputs(NamedTuple):
    """What a step computed.

    Attributes:
        logits: [R, vocab_size] float32 of the wanted rows; empty if there are none.
        hidden: Hidden states of all rows as the model hands them over, for a draft model; the runner's own tensor.
    """

    logits: npt.NDArray[np.float32]
    hidden: Any


class StepRunner(Protocol):
    """What the engine needs of a model and its cache."""

    def run(self, inputs: StepInputs, *, before_layer: Callable[[int], None] | None = None) -> StepOutputs:
        """Write the rows' cache entries and compute logits of the wanted rows.

        Args:
            inputs: The rows.
            before_layer: Called with every layer id before the first access to a cache tensor of that layer; what it
                raises goes to the caller.
        """


class CausalLM(Protocol):
    """What the runner needs of a model."""

    def forward(
        self,
        *,
        step: StepMetadata,
        attn_backend: Any,
        caches: Mapping[tuple[str, int], Tensor],
        before_layer: Callable[[int], None] | None = None,
        on_selection: Callable[[int, IndexSelection], None] | None = None,
    ) -> Tensor:
        """Hidden states of the step's tokens: what `compute_logits` and a draft model of the same family take."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits of rows of hidden states."""


class ModelRunner:
    """A model with its attention backend and cache."""

    def __init__(
        self,
        model: CausalLM,
        attn_backend: Any,
        caches: Mapping[tuple[str, int], Tensor],
        *,
        block_size: int,
        decode_limits: DecodeLimits | None = None,
        make_graph: Callable[[], Graph] | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            model: The model.
            attn_backend: Its AttentionBackend.
            caches: Cache tensors by (role, layer id).
            block_size: Tokens of a cache block.
            decode_limits: The largest decode step.
            make_graph: From `paddle_graphs`; None, or no decode_limits: decode steps are not captured.
        """
        self._model = model
        self._attn_backend = attn_backend
        self._caches = caches
        self._block_size = block_size
        self._graphs = None
        if decode_limits is not None and make_graph is not None:
            forward = partial(model.forward, attn_backend=attn_backend, caches=caches)
            self._graphs = DecodeGraphs(lambda step: forward(step=step), decode_limits, make_graph)

    def run(
        self,
        inputs: StepInputs,
        *,
        before_layer: Callable[[int], None] | None = None,
        on_selection: Callable[[int, IndexSelection], None] | None = None,
    ) -> StepOutputs:
        """Run one step.

        Args:
            inputs: The rows.
            before_layer: As StepRunner.run.
            on_selection: Called with (layer id, selection) by every layer that selects by itself.
        """
        with paddle.no_grad():
            if self._graphs is not None and on_selection is None and self._graphs.takes(inputs):
                self._announce_layers(before_layer)
                hidden = self._graphs.run(inputs)
            else:
                hidden = self._run_eagerly(inputs, before_layer, on_selection)
            rows = inputs.logits_rows
            if len(rows) == 0:  # only unfinished prefill chunks; .shape of an empty gather differs between places
                return StepOutputs(np.empty((0, 0), np.float32), hidden)
            wanted = hidden
            if len(rows) < len(inputs.token_ids):
                wanted = paddle.index_select(hidden, paddle.to_tensor(rows))
            return StepOutputs(self._model.compute_logits(wanted).numpy(), hidden)

    def _run_eagerly(
        self,
        inputs: StepInputs,
        before_layer: Callable[[int], None] | None,
        on_selection: Callable[[int, IndexSelection], None] | None,
    ) -> Tensor:
        return self._model.forward(
            step=inputs.metadata(self._block_size),
            attn_backend=self._attn_backend,
            caches=self._caches,
            before_layer=before_layer,
            on_selection=on_selection,
        )

    def _announce_layers(self, before_layer: Callable[[int], None] | None) -> None:
        """A replayed graph accesses all layers without a stop in between."""
        if before_layer is not None:
            for layer in sorted({layer for _, layer in self._caches}):
                before_layer(layer)
