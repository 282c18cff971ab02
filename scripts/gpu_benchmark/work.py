"""What a section hands to the timer: cases, and for each the contenders with their input sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Launch = Callable[[], object]
MakeLaunch = Callable[[Any], Launch]  # of an input set


class MissingContender(Exception):
    """A peer or a symbol of our library is not there."""


@dataclass(frozen=True)
class Cost:
    """The least a piece of work needs, each byte once."""

    flops: float
    num_bytes: float
    unit: str = "bf16"  # of the tensor cores: bf16 or fp8


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    text: str
    right: bool

    @staticmethod
    def of(error: float, bound: float) -> Verdict:
        return Verdict(f"{error:.1e}", error <= bound)


@dataclass(frozen=True)
class Contender:
    """A way to do the work.

    `make` prepares an input set and returns its launch, which leaves the result where `check` finds it: in the set.
    """

    name: str
    role: str
    make: MakeLaunch
    check: Callable[[Any], Verdict] | None
    cost: Cost | None = None  # None: that of the work


@dataclass(frozen=True)
class Work:
    """One case: the same input sets for all contenders."""

    case: str
    sets: Sequence[Any]
    contenders: Sequence[Contender]
    cost: Cost
    poison: Callable[[Any], None] | None = None  # what outlives a contender must not pass the next one's check
    floor_us: float | None = None  # where stages depend on each other: the sum of their floors
