"""Decode steps as captured graphs: launching a step's kernels one by one can take longer than running them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from paddle import Tensor

from fastdeploy_dsa.device import CPU
from fastdeploy_dsa.engine.step_inputs import StepInputs
from fastdeploy_dsa.row_invariance import ROW_MULTIPLE
from fastdeploy_dsa.step import StepMetadata

_LOGGER = logging.getLogger(__name__)
_PERSISTENT = ("token_ids", "positions", "request_ids", "lengths", "slot_mapping", "block_table")


class Graph(Protocol):
    """What is used of Paddle's CUDAGraph."""

    def capture_begin(self) -> None:
        """From here on work is recorded and does not run."""

    def capture_end(self) -> None:
        """The graph is complete."""

    def replay(self) -> None:
        """Run what was recorded, on the memory it was recorded with."""

    def reset(self) -> None:
        """Let go of the graph's memory."""


@dataclass(frozen=True)
class DecodeLimits:
    """Sizes that a graph keeps for good.

    Attributes:
        max_num_seqs: Requests of a step.
        max_model_len: Tokens of a request.
        block_size: Tokens of a cache block.
    """

    max_num_seqs: int
    max_model_len: int
    block_size: int

    @property
    def max_blocks(self) -> int:
        """Blocks of a request."""
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True)
class _Captured:
    graph: Graph
    step: StepMetadata
    hidden: Tensor


def paddle_graphs(device: str, refusal: str) -> Callable[[], Graph] | None:
    """Maker of Paddle's graphs, or None, with the reason in the log, where decode steps cannot be captured.

    Args:
        device: Paddle's name of the device.
        refusal: Why the model cannot be captured; empty if it can.
    """
    if device == CPU:
        return None
    from paddle.device.cuda import graphs  # noqa: PLC0415 - GPU builds only

    is_supported = graphs.is_cuda_graph_supported()
    reason = refusal or ("" if is_supported else "this Paddle captures no graphs")
    if reason:
        _LOGGER.info("decode steps are not captured: %s", reason)
        return None
    maker: Callable[[], Graph] = graphs.CUDAGraph
    return maker


class DecodeGraphs:
    """One graph per number of rows, filled up to a multiple of 8; made when a step of that size comes first.

    All tensors that a step hands to the model stay where they are. A graph is captured right after the first step of
    its size has run eagerly on the same tensors, so that whatever is made at first use exists. Where a capture fails,
    the log says why and no other is tried.
    """

    def __init__(
        self,
        forward: Callable[[StepMetadata], Tensor],
        limits: DecodeLimits,
        make_graph: Callable[[], Graph],
    ) -> None:
        """Capture nothing yet.

        Args:
            forward: Step to hidden states; it must not read a tensor on the host.
            limits: The largest step.
            make_graph: A graph without content.
        """
        self._forward = forward
        self._limits = limits
        self._make_graph = make_graph
        self._captured: dict[int, _Captured] = {}
        self._has_failed = False
        # Paddle aborts the process if a graph is left when it ends.
        weakref.finalize(self, _reset, self._captured)

    def takes(self, inputs: StepInputs) -> bool:
        """Whether a step is one row of each request, and no more requests than there may be."""
        rows = len(inputs.token_ids)
        return not self._has_failed and rows == len(inputs.block_table) <= self._limits.max_num_seqs

    def run(self, inputs: StepInputs) -> Tensor:
        """Hidden states of a step that `takes` accepts, [requests, hidden_size]; valid until the next call."""
        rows = len(inputs.token_ids)
        num_rows = rows + -rows % ROW_MULTIPLE
        step = self._build(inputs, num_rows)
        captured = self._captured.get(num_rows)
        if captured is None:
            hidden = self._forward(step)
            self._capture(num_rows, step)
            return hidden[:rows]
        kept: list[Any] = [getattr(captured.step, name) for name in _PERSISTENT]
        fresh: list[Any] = [getattr(step, name) for name in _PERSISTENT]
        kept += captured.step.window_tables.values()
        fresh += step.window_tables.values()
        for tensor, content in zip(kept, fresh, strict=True):
            tensor.copy_(content, False)
        captured.graph.replay()
        return captured.hidden[:rows]

    def _build(self, inputs: StepInputs, num_rows: int) -> StepMetadata:
        """The step with the sizes of its graph; what no request uses has length 0 and slot -1."""
        windows = inputs.window_tables
        step = StepMetadata.build(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            request_ids=inputs.request_ids,
            block_table=_filled_up(inputs.block_table, num_rows, self._limits.max_blocks),
            block_size=self._limits.block_size,
            window_tables={pool: _filled_up(table, num_rows, table.shape[1]) for pool, table in windows.items()},
        )
        # The rows that fill up count, because a graph cannot leave them out.
        return replace(step, num_tokens=step.num_rows, max_length=self._limits.max_model_len)

    def _capture(self, num_rows: int, step: StepMetadata) -> None:
        graph = self._make_graph()
        try:
            graph.capture_begin()
            try:
                hidden = self._forward(step)
            finally:
                graph.capture_end()
        except (RuntimeError, ValueError, OSError, SystemError, MemoryError) as error:  # Paddle raises any of them
            self._has_failed = True
            _LOGGER.warning("decode steps are not captured: %s", error)
            return
        self._captured[num_rows] = _Captured(graph, step, hidden)


def _filled_up(table: npt.NDArray[np.int32], num_lines: int, width: int) -> npt.NDArray[np.int32]:
    """A block table with more lines and entries, -1."""
    filled = np.full((num_lines, width), -1, np.int32)
    filled[: table.shape[0], : table.shape[1]] = table
    return filled


def _reset(captured: dict[int, _Captured]) -> None:
    for one in captured.values():
        one.graph.reset()
    captured.clear()
