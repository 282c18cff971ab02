"""The rows of a step on the host, between the scheduler's plan and the tensors of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.step_plan import Chunk
from fastdeploy_dsa.step import StepMetadata


@dataclass(frozen=True)
class BlockTables:
    """Where requests have their tokens.

    Attributes:
        main: [lines, width] int32, blocks of all tokens in order of position; -1 where unused.
        windows: Pool name to [lines, width] int32, blocks of the last tokens, as rings; see StepMetadata.
    """

    main: npt.NDArray[np.int32]
    windows: Mapping[str, npt.NDArray[np.int32]] = field(default_factory=dict)

    def of(self, requests: Sequence[Request]) -> BlockTables:
        """The lines of running requests, in their order."""
        lines = np.array([request.line for request in requests], np.int64)
        return BlockTables(self.main[lines], {pool: table[lines] for pool, table in self.windows.items()})


@dataclass(frozen=True)
class StepInputs:
    """Rows of a step on the host.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int32.
        request_ids: [T] int32, line of block_table.
        block_table: [num_requests, width] int32.
        logits_rows: [R] int64, the rows whose logits are wanted, ascending.
        window_tables: Pool name to [num_requests, width] int32; see StepMetadata.
    """

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int32]
    request_ids: npt.NDArray[np.int32]
    block_table: npt.NDArray[np.int32]
    logits_rows: npt.NDArray[np.int64]
    window_tables: Mapping[str, npt.NDArray[np.int32]] = field(default_factory=dict)

    @classmethod
    def from_chunks(cls, chunks: Sequence[Chunk], tables: BlockTables, block_size: int) -> StepInputs:
        """Rows of scheduled chunks, in their order; logits behind the newest token of requests and behind each draft.

        Args:
            chunks: At least one.
            tables: The scheduler's.
            block_size: Tokens of a block.
        """
        counts = np.array([chunk.num_rows for chunk in chunks], np.int64)
        starts = np.array([chunk.request.num_computed for chunk in chunks], np.int64)
        ends = np.cumsum(counts)
        offsets = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        pieces: list[Any] = []
        wanted: list[int] = []
        for (request, num_tokens, num_drafts, is_last), end in zip(chunks, ends.tolist(), strict=True):
            pieces.append(request.tokens[request.num_computed : request.num_computed + num_tokens])
            if num_drafts:
                pieces.append([draft.token for draft in request.drafts])
            if is_last:
                wanted += range(end - 1 - num_drafts, end)
        return cls.of_rows(
            token_ids=np.concatenate(pieces),
            positions=np.repeat(starts, counts) + offsets,
            request_ids=np.repeat(np.arange(len(chunks)), counts),
            tables=tables.of([chunk.request for chunk in chunks]),
            logits_rows=np.array(wanted, np.int64),
            block_size=block_size,
        )

    @classmethod
    def of_rows(
        cls,
        *,
        token_ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        request_ids: npt.NDArray[np.int64],
        tables: BlockTables,
        logits_rows: npt.NDArray[np.int64],
        block_size: int,
    ) -> StepInputs:
        """Rows with a block table as wide as they need it."""
        width = -(-int(positions.max() + 1) // block_size)
        return cls(
            token_ids=token_ids,
            positions=positions.astype(np.int32),
            request_ids=request_ids.astype(np.int32),
            block_table=tables.main[:, :width],
            logits_rows=logits_rows,
            window_tables=tables.windows,
        )

    def only(self, rows: npt.NDArray[np.int64]) -> StepInputs:
        """Some of the rows, with the logits of each."""
        return replace(
            self,
            token_ids=self.token_ids[rows],
            positions=self.positions[rows],
            request_ids=self.request_ids[rows],
            logits_rows=np.arange(len(rows)),
        )

    def metadata(self, block_size: int) -> StepMetadata:
        """The rows as the layers take them."""
        return StepMetadata.build(
            token_ids=self.token_ids,
            positions=self.positions,
            request_ids=self.request_ids,
            block_table=self.block_table,
            block_size=block_size,
            window_tables=self.window_tables,
        )
