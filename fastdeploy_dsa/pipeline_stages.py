"""Layers of pipeline stages, and what a stage that begins with a shared layer does for its selection (S24, S54)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from fastdeploy_dsa.index_schedule import IndexSchedule, IndexScheduleError

PipelineIndexMode = Literal["carry", "force_full", "error"]
PIPELINE_INDEX_MODES: tuple[PipelineIndexMode, ...] = get_args(PipelineIndexMode)


@dataclass(frozen=True)
class StagedSchedule:
    """A schedule cut into pipeline stages.

    Attributes:
        schedule: The schedule; with "force_full" it has more full layers than the one that was cut.
        stage_starts: First layer of each stage; the first is 0.
        carried_starts: Those of them at which the stage before sends the rows of its selection along, [T, index_topk]
            int32 positions beside the hidden states.
    """

    schedule: IndexSchedule
    stage_starts: tuple[int, ...]
    carried_starts: tuple[int, ...] = ()


def stage_starts(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """First layer of each stage; the first stages have one layer more where the layers do not divide evenly.

    Raises:
        ValueError: Not from 1 to num_layers stages.
    """
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"pp: expected an int from 1 to {num_layers}, the number of layers, got {num_stages}")
    size, larger = divmod(num_layers, num_stages)
    return tuple(stage * size + min(stage, larger) for stage in range(num_stages))


def stage_schedule(
    schedule: IndexSchedule, starts: tuple[int, ...], num_layers: int, mode: PipelineIndexMode = "carry"
) -> StagedSchedule:
    """Decide where stages get their first selection from.

    Args:
        schedule: Of the whole model.
        starts: First layer of each stage, ascending from 0.
        num_layers: Backbone layers.
        mode: For a stage whose first selecting layer is shared. "carry": the stage before sends its selection.
            "force_full": the layer becomes full, on all ranks alike; it then needs indexer weights and an index cache.
            "error": it is refused.

    Raises:
        ValueError: Starts that do not ascend from 0 inside the model, or an unknown mode.
        IndexScheduleError: E11, in mode "error".
    """
    ends = (*starts[1:], num_layers)
    if not starts or starts[0] != 0 or any(start >= end for start, end in zip(starts, ends, strict=True)):
        raise ValueError(f"stage_starts: expected ascending layers from 0, below {num_layers}, got {starts}")
    if mode not in PIPELINE_INDEX_MODES:
        raise ValueError(f"pp_index_mode: expected one of {', '.join(PIPELINE_INDEX_MODES)}, got {mode!r}")
    letters, carried = list(schedule.letters), []
    for start, end in zip(starts, ends, strict=True):
        place = next((i for i, layer in enumerate(schedule.layer_ids) if layer >= start), None)
        if place is None or letters[place] == "F":
            continue
        layer = schedule.layer_ids[place]
        if mode == "error":
            first = f"layer {layer}" if layer == start else f"the first layer with an indexer, {layer},"
            raise IndexScheduleError(
                "E11", f"the pipeline stage from layer {start} on: {first} is shared, expected a full layer"
            )
        if mode == "carry":
            carried.append(start)
        elif layer < end:
            letters[place] = "F"
    return StagedSchedule(replace(schedule, letters="".join(letters)), starts, tuple(carried))


def require_buffers(schedule: IndexSchedule, num_micro_batches: int, num_index_buffers: int) -> None:
    """Refuse batches that overlap in time but share a buffer of selections, which shared layers still read (S27).

    Raises:
        IndexScheduleError: E12.
    """
    if "S" in schedule.letters and num_index_buffers < num_micro_batches:
        raise IndexScheduleError(
            "E12",
            f"{num_micro_batches} overlapping batches with shared layers: expected a buffer of selections for each,"
            f" got {num_index_buffers}",
        )
