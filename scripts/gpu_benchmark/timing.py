"""Times of contenders: checked first, then replayed from CUDA graphs over cold input sets."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scripts.gpu_benchmark.record import Journal, Row
from scripts.gpu_benchmark.work import Contender, Cost, Launch, MissingContender, Work

DEVICE_ERROR_EXIT = 3
_MAX_LAUNCHES = 400  # in one graph
_MIN_REPLAY_MS = 1.5  # a replay costs some us of its own: launches are repeated until it drowns


@dataclass(frozen=True)
class Times:
    """Microseconds a launch, over replays."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile


def _elapsed_ms(replay: Launch) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _captured(launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(2):
        graph.replay()
    return graph


def _warmed_up(launches: Sequence[Launch]) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for launch in launches[:2]:
            launch()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def graph_times(launches: Sequence[Launch], budget_ms: float) -> Times:
    """Replays of a graph that holds every launch once, or several times where they are short."""
    _warmed_up(launches)
    graph = _captured(launches)
    replay_ms = max(_elapsed_ms(graph.replay), 1e-3)
    repeats = min(math.ceil(_MIN_REPLAY_MS / replay_ms), _MAX_LAUNCHES // len(launches))
    if repeats > 1:
        launches = list(launches) * repeats
        graph = _captured(launches)
        replay_ms = max(_elapsed_ms(graph.replay), 1e-3)
    count = max(7, min(200, int(budget_ms / replay_ms)))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) * 1e3 / len(launches) for start, end in events)
    return Times(times[count // 2], times[count // 10], times[(9 * count) // 10])


class Timer:
    """Measures works into a journal, and leaves out what an earlier process of the section has finished."""

    def __init__(self, journal: Journal, ceilings: dict[str, float], budget_ms: float) -> None:
        self._journal = journal
        self._ceilings = ceilings
        self._budget_ms = budget_ms
        self._finished = journal.finished()

    def set_count(self, num_bytes: float, *, most: int = 96) -> int:
        """Input sets whose bytes exceed 2.5 times the L2, so that every launch finds its inputs cold."""
        wanted = 2.5 * self._ceilings.get("l2_bytes", 60e6)
        return int(max(1, min(most, math.ceil(wanted / max(num_bytes, 1)))))

    def floor(self, cost: Cost) -> tuple[float, str]:
        """(us, what sets it): bytes over the rate of a copy, or flops over that of a matmul."""
        by_bytes = cost.num_bytes / (self._ceilings.get("copy_gbs", 4270) * 1e3)
        by_flops = cost.flops / (self._ceilings.get(f"{cost.unit}_tflops", 800) * 1e6)
        return max((by_bytes, "bytes"), (by_flops, "flops"))

    def measure(self, work: Work) -> None:
        """Check and time all contenders of a case."""
        for contender in work.contenders:
            if (work.case, contender.name) in self._finished:
                continue
            self._journal.begun(work.case, contender.name)
            try:
                self._measure(work, contender)
            except MissingContender as missing:
                self._journal.missing(str(missing), "not there")
                self._failed(work, contender, f"{missing} is missing")
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                self._failed(work, contender, f"{type(error).__name__}: {error}")
                if any(word in str(error) for word in ("CUDA error", "cudaError", "illegal", "DSA status 1")):
                    os._exit(DEVICE_ERROR_EXIT)  # the context may be lost: only a new process can go on
        if torch.cuda.memory_reserved() > 24 << 30:
            gc.collect()
            torch.cuda.empty_cache()

    def _failed(self, work: Work, contender: Contender, reason: str) -> None:
        line = reason.strip().splitlines()[0][:200]
        print(f"{self._journal.section:9s}| {work.case:24s}| {contender.name:24s}| {line}", flush=True)
        self._journal.failed(work.case, contender.name, line)

    def _measure(self, work: Work, contender: Contender) -> None:
        first = contender.make(work.sets[0])
        if work.poison:
            work.poison(work.sets[0])
        first()
        torch.cuda.synchronize()
        verdict = contender.check(work.sets[0]) if contender.check else None
        times = graph_times([first, *(contender.make(inputs) for inputs in work.sets[1:])], self._budget_ms)
        cost = contender.cost or work.cost
        floor_us, floor_kind = self.floor(cost) if work.floor_us is None else (work.floor_us, "stages")
        row = Row(
            section=self._journal.section,
            case=work.case,
            contender=contender.name,
            role=contender.role,
            us=times.median,
            low_us=times.low,
            high_us=times.high,
            flops=cost.flops,
            num_bytes=cost.num_bytes,
            floor_us=floor_us,
            floor_kind=floor_kind,
            error=verdict.text if verdict else "-",
            right=verdict.right if verdict else True,
        )
        self._journal.row(row)
        wrong = "" if row.right else " WRONG"
        print(
            f"{row.section:9s}| {row.case:24s}| {row.contender:24s}| {row.us:9.2f} us | "
            f"floor {row.floor_us:8.2f} {row.floor_kind:6s}| {row.error}{wrong}",
            flush=True,
        )
