"""What every layer of one forward step needs to know about its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from fastdeploy_dsa.row_invariance import ROW_MULTIPLE


@dataclass(frozen=True)
class StepMetadata:
    """The rows of one forward step: prefill, decode and verify tokens alike, in one order.

    Tensors have num_rows rows; those from num_tokens on are padding (length 0, slot -1).

    Attributes:
        token_ids: [num_rows] int64.
        positions: [num_rows] int32, place of the token in its request, from 0.
        request_ids: [num_rows] int32, line of block_table.
        lengths: [num_rows] int32, visible tokens: positions + 1, 0 for padding.
        slot_mapping: [num_rows] int64, where the token's cache entries go; -1 for padding.
        block_table: [num_requests, max_blocks] int32, -1 where unused.
        num_tokens: Rows that are tokens.
        max_length: Largest of lengths.
        window_tables: Pool name to [num_requests, width] int32: blocks of the cache's window pools, as rings: position
            p of a request is in block window_tables[pool][line, (p // block_tokens) % width]; -1 where unused.
    """

    token_ids: Tensor
    positions: Tensor
    request_ids: Tensor
    lengths: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    num_tokens: int
    max_length: int
    window_tables: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        *,
        token_ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int32],
        request_ids: npt.NDArray[np.int32],
        block_table: npt.NDArray[np.int32],
        block_size: int,
        window_tables: Mapping[str, npt.NDArray[np.int32]] | None = None,
        batch_invariant: bool = True,
    ) -> StepMetadata:
        """Derive slots and lengths and move everything into tensors.

        Args:
            token_ids: [T] int64.
            positions: [T] int32.
            request_ids: [T] int32, line of block_table.
            block_table: [num_requests, max_blocks] int32, -1 where unused.
            block_size: Tokens of a block.
            window_tables: Pool name to [num_requests, width] int32; None: the cache has no window pools.
            batch_invariant: Fill the rows up, so that no row's result depends on the others.

        Raises:
            ValueError: No token, arrays of different length, or a position without a block.
        """
        num_tokens = len(token_ids)
        if num_tokens == 0 or len(positions) != num_tokens or len(request_ids) != num_tokens:
            raise ValueError(
                "token_ids, positions, request_ids: expected equal lengths above 0, "
                f"got {num_tokens}, {len(positions)}, {len(request_ids)}"
            )
        slot_mapping = _slots(positions, request_ids, block_table, block_size)
        fill = -num_tokens % ROW_MULTIPLE if batch_invariant else 0
        lengths = (positions + 1).astype(np.int32)
        return cls(
            token_ids=_padded(token_ids.astype(np.int64), fill, 0),
            positions=_padded(positions.astype(np.int32), fill, 0),
            request_ids=_padded(request_ids.astype(np.int32), fill, 0),
            lengths=_padded(lengths, fill, 0),
            slot_mapping=_padded(slot_mapping, fill, -1),
            block_table=paddle.to_tensor(np.ascontiguousarray(block_table, np.int32)),
            num_tokens=num_tokens,
            max_length=int(lengths.max()),
            window_tables={
                pool: paddle.to_tensor(np.ascontiguousarray(table, np.int32))
                for pool, table in (window_tables or {}).items()
            },
        )

    @property
    def num_rows(self) -> int:
        """Rows of the tensors, padding included."""
        return int(self.token_ids.shape[0])


def _slots(
    positions: npt.NDArray[np.int32],
    request_ids: npt.NDArray[np.int32],
    block_table: npt.NDArray[np.int32],
    block_size: int,
) -> npt.NDArray[np.int64]:
    blocks = block_table[request_ids, positions // block_size].astype(np.int64)
    if (blocks < 0).any():
        row = int(np.argmax(blocks < 0))
        raise ValueError(f"block_table: no block for position {positions[row]} of request {request_ids[row]}")
    return blocks * block_size + positions % block_size


def _padded(values: npt.NDArray[Any], fill: int, value: int) -> Tensor:
    if fill:
        values = np.concatenate([values, np.full(fill, value, values.dtype)])
    return paddle.to_tensor(values)
