"""What a run found, as JSON; needs no torch.

A section runs in a child process and writes a line of JSON for every event, so that what it had measured before it
died is kept. The parent gathers the lines into one document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OURS = "ours"
PEER = "peer"  # the same work on the same cache format
OTHER_FORMAT = "other format"  # a second opinion: the same rows out of a bfloat16 cache
PART = "part"  # a piece of the work, for information


@dataclass(frozen=True)
class Row:
    """One contender on one case. Times are microseconds a launch."""

    section: str
    case: str
    contender: str
    role: str
    us: float
    low_us: float
    high_us: float
    flops: float
    num_bytes: float
    floor_us: float
    floor_kind: str  # set by bytes, by flops, or a sum of stages
    error: str
    right: bool


@dataclass(frozen=True)
class Failure:
    """A contender without a time."""

    section: str
    case: str
    contender: str
    reason: str


@dataclass
class Run:
    """A whole run."""

    facts: dict[str, str] = field(default_factory=dict)  # device, driver, date, revision, ..
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # peers and symbols that are not there, and why
    repeats: dict[str, str] = field(default_factory=dict)  # op: whether repeated runs agreed bit for bit
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Run:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["rows"] = [Row(**row) for row in found["rows"]]
        found["failures"] = [Failure(**failure) for failure in found["failures"]]
        return Run(**found)


class Journal:
    """The events of one section, a line each."""

    def __init__(self, path: Path, section: str) -> None:
        self._path = path
        self.section = section

    def write(self, kind: str, **event: Any) -> None:
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"kind": kind, "section": self.section, **event}) + "\n")

    def begun(self, case: str, contender: str) -> None:
        self.write("begun", case=case, contender=contender)

    def row(self, row: Row) -> None:
        self.write("row", row=asdict(row))

    def failed(self, case: str, contender: str, reason: str) -> None:
        self.write("failed", case=case, contender=contender, reason=reason)

    def missing(self, name: str, reason: str) -> None:
        self.write("missing", name=name, reason=reason)

    def size(self) -> int:
        """Bytes written so far: it grows while the section is alive."""
        return self._path.stat().st_size if self._path.exists() else 0

    def events(self) -> Iterator[dict[str, Any]]:
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):  # the last line of a killed process may be cut
                    yield json.loads(line)

    def is_done(self) -> bool:
        """Whether the section has come to its end."""
        return any(event["kind"] == "done" for event in self.events())

    def finished(self) -> set[tuple[str, str]]:
        """(case, contender) of everything that needs no second try."""
        done = set()
        for event in self.events():
            if event["kind"] == "row":
                done.add((event["row"]["case"], event["row"]["contender"]))
            elif event["kind"] == "failed":
                done.add((event["case"], event["contender"]))
        return done

    def last_begun(self) -> tuple[str, str] | None:
        """(case, contender) that was running when the process died."""
        begun = [(event["case"], event["contender"]) for event in self.events() if event["kind"] == "begun"]
        return begun[-1] if begun and begun[-1] not in self.finished() else None

    def gather(self, run: Run) -> None:
        """Put all events into the run."""
        for event in self.events():
            if event["kind"] == "row":
                run.rows.append(Row(**event["row"]))
            elif event["kind"] == "failed":
                run.failures.append(Failure(self.section, event["case"], event["contender"], event["reason"]))
            elif event["kind"] == "missing":
                run.missing[event["name"]] = event["reason"]
            elif event["kind"] == "ceilings":
                run.ceilings.update(event["values"])
            elif event["kind"] == "repeat":
                run.repeats[event["op"]] = event["outcome"]
            elif event["kind"] == "facts":
                run.facts.update(event["values"])
            elif event["kind"] == "done":
                run.seconds[self.section] = event["seconds"]
