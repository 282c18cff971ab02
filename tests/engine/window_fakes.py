"""What a model whose cache has window pools looks at, checked against a cache of all tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cache_manager import CachePool, TensorKey
from fastdeploy_dsa.engine.step_inputs import StepInputs

# Every row sees the last 7 tokens; every third row sees the last 6, or the last 3 and nothing before.
POOLS = (
    CachePool("window", block_tokens=2, live_tokens=7, boundary_tokens=6),
    CachePool("overlapping", block_tokens=3, live_tokens=6, boundary_tokens=3),
    CachePool("closed", block_tokens=1, live_tokens=3, boundary_tokens=0),
)
CLOSING = 3
DRAFTED = {"window"}
"""Pools that the draft model's layers have, too."""


def sees(pool: CachePool, position: int) -> range:
    """Positions whose rows of a pool the row of a position looks at."""
    if pool.boundary_tokens == pool.live_tokens - 1 or (position + 1) % CLOSING == 0:
        return range(max(0, position + 1 - pool.live_tokens), position + 1)
    return range(position, position + 1)


def write_and_check_windows(
    caches: Mapping[TensorKey, npt.NDArray[np.int64]],
    inputs: StepInputs,
    layer: int,
    all_tokens: npt.NDArray[np.int64],
) -> None:
    """Write a step's rows to the layer's windows, then look at what every row sees.

    Args:
        caches: By (role, layer); a window's role is its pool.
        inputs: The rows.
        layer: Of the caches.
        all_tokens: [num_blocks, block_size], the layer's cache of all tokens, written already.
    """
    for pool in POOLS:
        window = caches.get((pool.name, layer))
        if window is None:
            continue
        table = inputs.window_tables[pool.name]
        slots = slots_of(pool, table, inputs.request_ids, inputs.positions)
        assert len(set(slots.tolist())) == len(slots), "two rows share a slot of a window"
        window.reshape(-1)[slots] = inputs.token_ids
        for line, position in zip(inputs.request_ids, inputs.positions.tolist(), strict=True):
            seen = np.array(sees(pool, position))
            places, offsets = np.divmod(seen, all_tokens.shape[1])
            expected = all_tokens[inputs.block_table[line, places], offsets]
            found = window.reshape(-1)[slots_of(pool, table, np.full(len(seen), line), seen)]
            assert np.array_equal(found, expected), (
                f"pool {pool.name}: position {position} sees {found}, not {expected}"
            )


def slots_of(
    pool: CachePool,
    table: npt.NDArray[np.int32],
    lines: npt.NDArray[np.int32],
    positions: npt.NDArray[np.int32] | npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    blocks = table[lines, positions // pool.block_tokens % table.shape[1]].astype(np.int64)
    assert (blocks >= 0).all(), f"pool {pool.name}: a position has no block"
    slots: npt.NDArray[np.int64] = blocks * pool.block_tokens + positions % pool.block_tokens
    return slots
