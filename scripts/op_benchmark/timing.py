"""How a row of the table is measured: ours and the peer in turns, cold caches, idle cores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from fastdeploy_dsa import ops

Action = Callable[[], Any]

CORES = len(os.sched_getaffinity(0))
FLUSH_BYTES = 96 << 20  # written before every run; larger than the last-level cache of the machines we use
IDLE_S = 0.25  # after which the threads of any OpenMP runtime have stopped spinning
MIN_RUNS = 9


@dataclass(frozen=True)
class Work:
    """One row of the table."""

    op: str
    name: str
    run: Action
    check: Callable[[Any], None]  # of what run returns
    peers: dict[str, Action]  # ways to compose the same from Paddle's ops; the fastest counts
    num_bytes: int  # read and written at least
    num_flops: int
    required: float | None = None  # ratio that the project promises


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Median and quartiles."""
        low, _, high = quantiles(seconds, n=4)
        return cls(median(seconds), low, high)


@dataclass(frozen=True)
class Rates:
    """The best that the machine showed during the run."""

    copy: float  # bytes per second, read plus written
    matmul: float  # float32 FLOP per second, Paddle's matmul

    @classmethod
    def measured(cls) -> Rates:
        """As they are now."""
        return cls(copy_rate(), matmul_rate())

    def best(self, other: Rates) -> Rates:
        """The larger of each."""
        return Rates(max(self.copy, other.copy), max(self.matmul, other.matmul))


@dataclass(frozen=True)
class Result:
    """A timed row."""

    op: str
    name: str
    ours: Timing
    peer: Timing | None
    peer_name: str
    num_bytes: int
    num_flops: int
    required: float | None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the peer."""
        return self.peer.median / self.ours.median if self.peer else None

    def bound(self, rates: Rates) -> float:
        """Seconds that the bytes or the FLOPs take at least."""
        return max(self.num_bytes / rates.copy, self.num_flops / rates.matmul)


class Contender:
    """One side of a comparison: what is timed, and a small call that wakes the threads it runs on."""

    def __init__(self, run: Action, wake: Action) -> None:
        self.run = run
        self.wake = wake


def ours(run: Action) -> Contender:
    """One of our ops; copying blocks of 2 MB wakes the threads of them all."""
    src, dst = (paddle.zeros([8, 256 << 10], dtype="uint8") for _ in range(2))
    ids = paddle.arange(8, dtype="int64")
    return Contender(run, partial(ops.block_copy, src=src, dst=dst, src_block_ids=ids, dst_block_ids=ids))


def paddles(run: Action) -> Contender:
    """A composition of Paddle's ops."""
    small = paddle.rand([256, 256])
    return Contender(run, partial(paddle.matmul, small, small))


def seconds_of(contender: Contender, buffer: npt.NDArray[np.uint8]) -> float:
    """Seconds of one run with cold caches, the other side's threads asleep and its own awake, as inside a model."""
    time.sleep(IDLE_S)
    buffer += 1
    contender.wake()
    contender.wake()
    start = time.perf_counter()
    contender.run()
    return time.perf_counter() - start


def take_turns(contenders: list[Contender], budget_s: float) -> list[Timing]:
    """Time both alternately, so that a disturbance meets both."""
    buffer = np.zeros(FLUSH_BYTES, np.uint8)
    for contender in contenders:
        contender.run()
    runs: list[list[float]] = [[] for _ in contenders]
    end = time.perf_counter() + budget_s
    while len(runs[0]) < MIN_RUNS or time.perf_counter() < end:
        for contender, seconds in zip(contenders, runs, strict=True):
            seconds.append(seconds_of(contender, buffer))
    return [Timing.of(seconds) for seconds in runs]


def fastest(peers: dict[str, Action]) -> tuple[str, Action]:
    """The fastest of three runs each."""
    buffer = np.zeros(FLUSH_BYTES, np.uint8)
    best = {name: min(seconds_of(paddles(peer), buffer) for _ in range(3)) for name, peer in peers.items()}
    name = min(best, key=lambda key: best[key])
    return name, peers[name]


def copy_rate() -> float:
    """Bytes read plus bytes written per second by one copying thread on every core."""
    parts = [(np.ones(64 << 20, np.uint8), np.empty(64 << 20, np.uint8)) for _ in range(CORES)]

    def copy_all() -> None:
        threads = [threading.Thread(target=np.copyto, args=(target, source)) for source, target in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    copy_all()
    best = min(timed(copy_all) for _ in range(7))
    return 2 * sum(source.nbytes for source, _ in parts) / best


def matmul_rate() -> float:
    """Float32 FLOP per second of Paddle's matmul."""
    n = 2048
    a = paddle.rand([n, n])
    paddle.matmul(a, a)
    best = min(timed(partial(paddle.matmul, a, a)) for _ in range(9))
    return 2 * n**3 / best


def timed(action: Action) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(work: Work, budget_s: float) -> Result:
    """Check the answer, then time it.

    Raises:
        AssertionError: The answer is wrong.
    """
    work.check(work.run())
    peer_name, contenders = "", [ours(work.run)]
    if work.peers:
        peer_name, peer = fastest(work.peers)
        contenders.append(paddles(peer))
    timings = take_turns(contenders, budget_s)
    return Result(
        op=work.op,
        name=work.name,
        ours=timings[0],
        peer=timings[1] if work.peers else None,
        peer_name=peer_name,
        num_bytes=work.num_bytes,
        num_flops=work.num_flops,
        required=work.required,
    )
