"""The block tables that steps are given: a line for every running request."""

# ruff: noqa: S101 - asserts here are for bugs of the scheduler

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cache_manager import CachePool
from fastdeploy_dsa.engine.request import Request, SlotLine
from fastdeploy_dsa.engine.step_inputs import BlockTables
from fastdeploy_dsa.engine.step_plan import SchedulerLimits


class RequestLines:
    """Gives requests their lines and keeps what stands in them.

    Attributes:
        tables: main [max_num_seqs, blocks of max_model_len] int32, and of every window pool [max_num_seqs, width]
            int32. A request's windows are those of the latest step that was prepared for it.
    """

    def __init__(self, limits: SchedulerLimits, pools: Sequence[CachePool]) -> None:
        """Start with free lines."""
        num_lines = limits.max_num_seqs
        self._free = [SlotLine(line) for line in range(num_lines - 1, -1, -1)]
        self._num_lines = num_lines
        self.tables = BlockTables(
            _unused(num_lines, limits.num_blocks(limits.max_model_len)),
            {pool.name: _unused(num_lines, pool.ring_width(limits.num_ring_tokens)) for pool in pools},
        )

    @property
    def num_free(self) -> int:
        """Lines without a request."""
        return len(self._free)

    def enter(self, request: Request) -> None:
        """Give a request a line with its main blocks."""
        request.line = self._free.pop()
        self.write_main(request, 0)

    def leave(self, request: Request) -> None:
        """Take the line away."""
        assert request.line is not None, "only a running request has a line"
        for table in (self.tables.main, *self.tables.windows.values()):
            table[request.line] = -1
        self._free.append(request.line)
        request.line = None

    def write_main(self, request: Request, first: int) -> None:
        """Take over a request's main blocks from index first on."""
        changed = request.blocks[first:]
        if changed:
            self.tables.main[request.line, first : first + len(changed)] = changed

    def write(self, request: Request, first: int) -> None:
        """The same, and all of its window blocks."""
        self.write_main(request, first)
        if request.table is not None:
            for name, window in request.table.windows.items():
                window.write_ring(self.tables.windows[name][request.line])

    def cut_main(self, request: Request) -> None:
        """A request has given main blocks back."""
        self.tables.main[request.line, len(request.blocks) :] = -1

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Assert that every line is free or a request's, and says what that holds."""
        assert len(running) + len(self._free) == self._num_lines, "a line is lost"
        used = 0
        for request in running:
            assert request.line is not None, "a running request has no line"
            assert request.table is not None, "a running request has no table"
            blocks = self.tables.main[request.line]
            blocks = blocks[blocks >= 0]
            # After a failed load the two differ until `recover`.
            is_equal = blocks.tolist() == request.blocks or request.table.failure is not None
            assert is_equal, "the block table differs from the request"
            used += len(blocks)
        assert int((self.tables.main >= 0).sum()) == used, "the block table has entries without a request"
        for table in self.tables.windows.values():
            assert (table[self._free] == -1).all(), "a window table has entries without a request"


def _unused(num_lines: int, width: int) -> npt.NDArray[np.int32]:
    return np.full((num_lines, width), -1, np.int32)
