"""What every row of a step sees and writes, by brute force over positions 0 to 1100."""

from __future__ import annotations

import numpy as np
import pytest

from fastdeploy_dsa.attention.deepseek_v4.step import CompressedStep
from fastdeploy_dsa.compressed_cache_layout import CompressedSizes
from fastdeploy_dsa.step import StepMetadata

LONGEST = 1101
BLOCK_SIZE = 256
WINDOW_BLOCK = 64


def sizes_of(window: int, ratios: tuple[int, ...] = (1, 4, 128)) -> CompressedSizes:
    return CompressedSizes(
        head_dim=48,
        qk_rope_head_dim=16,
        index_head_dim=32,
        sliding_window=window,
        ratios=tuple(enumerate(ratios)),
        selecting_layers=tuple(layer for layer, ratio in enumerate(ratios) if ratio == 4),
    )


class Tables:
    """Two requests' blocks: main ones in random order; window blocks as a ring of so many."""

    def __init__(self, ring: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.main = rng.permutation(2 * -(-LONGEST // BLOCK_SIZE)).reshape(2, -1).astype(np.int32)
        self.window = rng.permutation(2 * ring).reshape(2, ring).astype(np.int32)

    def step(self, positions: np.ndarray, requests: np.ndarray) -> StepMetadata:
        return StepMetadata.build(
            token_ids=np.zeros(len(positions), np.int64),
            positions=positions.astype(np.int32),
            request_ids=requests.astype(np.int32),
            block_table=self.main,
            block_size=BLOCK_SIZE,
            window_tables={"swa": self.window},
        )

    def window_slot(self, request: int, position: int) -> int:
        block = self.window[request, position // WINDOW_BLOCK % self.window.shape[1]]
        return int(block) * WINDOW_BLOCK + position % WINDOW_BLOCK

    def entry_slot(self, request: int, entry: int, ratio: int) -> int:
        of_block = BLOCK_SIZE // ratio
        return int(self.main[request, entry // of_block]) * of_block + entry % of_block


@pytest.mark.parametrize("window", [1, 8, 100, 128])
def test_every_row_sees_its_window_and_the_closed_entries(window: int) -> None:
    """Rules S19 and S20; the rows of both requests in one step, in random order."""
    tables = Tables(ring=-(-LONGEST // WINDOW_BLOCK))
    rng = np.random.default_rng(1)
    order = rng.permutation(2 * LONGEST)
    positions, requests = order % LONGEST, order // LONGEST
    step = CompressedStep.of(tables.step(positions, requests), sizes_of(window), BLOCK_SIZE)
    slots, counts = step.window_slots.numpy(), step.window_counts.numpy()
    every = step.all_entries
    assert every is not None
    numbers, entry_slots, entry_counts = (part.numpy() for part in every)
    four, mapping = step.entry_counts[4].numpy(), step.window_mapping.numpy()
    for row, (p, b) in enumerate(zip(positions.tolist(), requests.tolist(), strict=True)):
        visible = list(range(max(0, p - window + 1), p + 1))
        expected = [tables.window_slot(b, q) for q in visible]
        assert counts[row] == len(visible)
        assert slots[row, : len(visible)].tolist() == expected
        assert (slots[row, len(visible) :] == -1).all()
        assert mapping[row] == expected[-1]
        closed = {ratio: [j for j in range(p + 1) if (j + 1) * ratio - 1 <= p] for ratio in (4, 128)}
        assert four[row] == len(closed[4])
        assert entry_counts[row] == len(closed[128])
        assert numbers[row, : len(closed[128])].tolist() == closed[128]
        assert entry_slots[row, : len(closed[128])].tolist() == [tables.entry_slot(b, j, 128) for j in closed[128]]
        assert (numbers[row, len(closed[128]) :] == -1).all()
        assert (entry_slots[row, len(closed[128]) :] == -1).all()
        for ratio in (4, 128):
            slot = tables.entry_slot(b, p // ratio, ratio) if (p + 1) % ratio == 0 else -1
            assert step.entry_mapping[ratio].numpy()[row] == slot
    for tensor in (mapping, step.entry_mapping[4].numpy(), step.entry_mapping[128].numpy()):
        assert tensor.dtype == np.int64


def test_visible_entries_and_slots_are_those_of_the_examples() -> None:
    """Checks 5 and 7 of the rules."""
    tables = Tables(ring=18)
    tables.main[:] = [[9, 8, 7, 6, 5]] * 2
    positions = np.array([0, 2, 3, 4, 7, 126, 127, 255, 1000, 1022, 1023])
    step = CompressedStep.of(tables.step(positions, np.zeros(11, int)), sizes_of(128), BLOCK_SIZE)
    assert step.entry_counts[4].numpy()[:9].tolist() == [0, 0, 1, 1, 2, 31, 32, 64, 250]
    assert step.entry_counts[128].numpy()[:9].tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 7]
    assert step.entry_mapping[4].numpy()[9:11].tolist() == [-1, 447]
    assert step.entry_mapping[128].numpy()[9:11].tolist() == [-1, 13]


@pytest.mark.parametrize("ring", [2, 3, 5])
def test_window_blocks_are_a_ring(ring: int) -> None:
    tables, window = Tables(ring), 40
    positions = np.arange(700, 760)
    step = CompressedStep.of(tables.step(positions, np.ones(60, int)), sizes_of(window), BLOCK_SIZE)
    for row, p in enumerate(positions.tolist()):
        expected = [tables.window_slot(1, q) for q in range(p - window + 1, p + 1)]
        assert step.window_slots.numpy()[row].tolist() == expected


def test_padding_rows_see_and_write_nothing() -> None:
    tables = Tables(ring=18)
    step = CompressedStep.of(tables.step(np.array([127, 128, 129]), np.zeros(3, int)), sizes_of(128), BLOCK_SIZE)
    assert step.num_rows == 8
    for tensor in (step.window_mapping, *step.entry_mapping.values()):
        assert (tensor.numpy()[3:] == -1).all()
    for tensor in (step.window_counts, *step.entry_counts.values(), step.all_entries.counts):
        assert (tensor.numpy()[3:] == 0).all()
    assert (step.window_slots.numpy()[3:] == -1).all()
    assert (step.all_entries.slot_ids.numpy()[3:] == -1).all()


def test_blocks_that_are_missing_have_no_slots() -> None:
    """Of a window whose older blocks are gone, and of entries whose main block is."""
    tables = Tables(ring=18)
    tables.window[0, :2] = -1
    tables.main[0, 0] = -1
    step = tables.step(np.array([300]), np.zeros(1, int))
    prepared = CompressedStep.of(step, sizes_of(200), BLOCK_SIZE)
    window = prepared.window_slots.numpy()[0]
    assert (window[: 2 * WINDOW_BLOCK - 101] == -1).all()  # positions 101 .. 127
    assert (window[2 * WINDOW_BLOCK - 101 :] >= 0).all()
    assert (prepared.all_entries.slot_ids.numpy()[0] == -1).all()


@pytest.mark.parametrize("ratios", [(1,), (4, 4), (1, 4)])
def test_models_without_some_kind_of_layer_have_no_such_list(ratios: tuple[int, ...]) -> None:
    tables = Tables(ring=18)
    step = CompressedStep.of(tables.step(np.array([500]), np.zeros(1, int)), sizes_of(16, ratios), BLOCK_SIZE)
    assert step.all_entries is None
    assert sorted(step.entry_counts) == sorted(set(ratios) - {1})
