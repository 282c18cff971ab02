"""Pipeline stages that begin with a shared layer, and batches that overlap."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdeploy_dsa.index_schedule import IndexSchedule, IndexScheduleError, freq_letters
from fastdeploy_dsa.pipeline_stages import PIPELINE_INDEX_MODES, require_buffers, stage_schedule, stage_starts

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
GLM_52 = IndexSchedule(freq_letters(78, 4, 3))
V32_FREQ_4 = IndexSchedule(freq_letters(61, 4))
# Letters for layers 2, 4, 6, 8 of 10; the others have no indexer.
SPARSE = IndexSchedule("FSFS", layer_ids=(2, 4, 6, 8))


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "starts"),
    [(61, 4, (0, 16, 31, 46)), (78, 4, (0, 20, 40, 59)), (78, 2, (0, 39)), (5, 5, (0, 1, 2, 3, 4)), (7, 1, (0,))],
)
def test_the_first_stages_are_the_larger_ones(num_layers: int, num_stages: int, starts: tuple[int, ...]) -> None:
    assert stage_starts(num_layers, num_stages) == starts


@pytest.mark.parametrize("num_stages", [0, -1, 6])
def test_a_stage_has_at_least_one_layer(num_stages: int) -> None:
    message = f"pp: expected an int from 1 to 5, the number of layers, got {num_stages}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        stage_starts(5, num_stages)


@pytest.mark.parametrize(
    ("schedule", "starts", "num_layers", "carried"),
    [
        (GLM_52, (0, 39), 78, (39,)),
        (GLM_52, (0, 18, 38, 58), 78, ()),
        (V32_FREQ_4, (0, 16, 31, 46), 61, (16, 31, 46)),
        (V32_FREQ_4, (0, 17, 33, 49), 61, ()),
        (SPARSE, (0, 3), 10, (3,)),  # across layer 3, which has no indexer
        (SPARSE, (0, 5), 10, ()),
        (SPARSE, (0, 7, 8), 10, (7, 8)),  # through a stage that uses nothing
        (SPARSE, (0, 9), 10, ()),
        (IndexSchedule(""), (0, 3), 10, ()),
    ],
)
def test_a_selection_is_carried_where_the_next_selecting_layer_is_shared(
    schedule: IndexSchedule, starts: tuple[int, ...], num_layers: int, carried: tuple[int, ...]
) -> None:
    staged = stage_schedule(schedule, starts, num_layers)
    assert (staged.schedule, staged.stage_starts, staged.carried_starts) == (schedule, starts, carried)


@pytest.mark.parametrize(
    ("schedule", "starts", "num_layers", "more"),
    [
        (GLM_52, (0, 39), 78, {39}),
        (V32_FREQ_4, (0, 16, 31, 46), 61, {16, 31, 46}),
        (SPARSE, (0, 3), 10, {4}),
        (SPARSE, (0, 7, 8), 10, {8}),
        (GLM_52, (0, 18), 78, set()),
    ],
)
def test_a_stage_can_be_made_to_select_by_itself(
    schedule: IndexSchedule, starts: tuple[int, ...], num_layers: int, more: set[int]
) -> None:
    staged = stage_schedule(schedule, starts, num_layers, "force_full")
    assert set(staged.schedule.full_layers) == set(schedule.full_layers) | more
    assert staged.carried_starts == ()


@pytest.mark.parametrize(
    ("schedule", "starts", "num_layers", "message"),
    [
        (GLM_52, (0, 39), 78, "E11: the pipeline stage from layer 39 on: layer 39 is shared, expected a full layer"),
        (
            SPARSE,
            (0, 3),
            10,
            "E11: the pipeline stage from layer 3 on: the first layer with an indexer, 4, is shared, "
            "expected a full layer",
        ),
    ],
)
def test_a_shared_first_layer_can_be_refused(
    schedule: IndexSchedule, starts: tuple[int, ...], num_layers: int, message: str
) -> None:
    with pytest.raises(IndexScheduleError, match=f"^{re.escape(message)}$") as caught:
        stage_schedule(schedule, starts, num_layers, "error")
    assert caught.value.code == "E11"


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (0, 5, 4), (0, 78)])
def test_starts_must_ascend_from_0_inside_the_model(starts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="stage_starts: expected ascending layers from 0, below 78, got"):
        stage_schedule(GLM_52, starts, 78)


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="pp_index_mode: expected one of carry, force_full, error, got 'drop'"):
        stage_schedule(GLM_52, (0,), 78, "drop")  # type: ignore[arg-type]


@UNHURRIED
@given(
    letters=st.text("FS", min_size=1, max_size=60).map(lambda text: "F" + text[1:]),
    num_stages=st.integers(1, 8),
    mode=st.sampled_from(PIPELINE_INDEX_MODES),
)
def test_every_layer_finds_its_selection_inside_its_stage_or_carried_in(
    letters: str, num_stages: int, mode: str
) -> None:
    starts = stage_starts(len(letters), min(num_stages, len(letters)))
    try:
        staged = stage_schedule(IndexSchedule(letters), starts, len(letters), mode)  # type: ignore[arg-type]
    except IndexScheduleError:
        assert mode == "error"
        assert any(letters[start] == "S" for start in starts)
        return
    for layer in range(len(letters)):
        start = max(start for start in starts if start <= layer)
        assert staged.schedule.source(layer) >= start or start in staged.carried_starts
    assert mode != "force_full" or staged.carried_starts == ()


@pytest.mark.parametrize(("letters", "batches", "buffers"), [("FFFF", 2, 1), ("FSFS", 2, 2), ("FSFS", 1, 1)])
def test_batches_with_a_buffer_each_may_overlap(letters: str, batches: int, buffers: int) -> None:
    require_buffers(IndexSchedule(letters), batches, buffers)


def test_overlapping_batches_may_not_share_a_buffer() -> None:
    message = "E12: 2 overlapping batches with shared layers: expected a buffer of selections for each, got 1"
    with pytest.raises(IndexScheduleError, match=f"^{re.escape(message)}$"):
        require_buffers(IndexSchedule("FSFS"), 2, 1)
