"""The page of a run; needs no torch."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scripts.gpu_benchmark.promises import PROMISES, Promise, promise_of
from scripts.gpu_benchmark.record import OTHER_FORMAT, OURS, PART, PEER, Row, Run

NOTES = """\
Times are microseconds of one launch: the median over replays of a CUDA graph that holds a launch for every input set,
divided by the launches in it. Launch cost on the host is not in them, nor is what callers compute once a step. Enough
input sets take turns that their bytes exceed 2.5 times the L2: every launch finds its inputs cold, as in a model,
where other layers ran in between. The rows of top-k stay in the L2, where the indexer has just written them. Ours and
the peers ran in one process, on the same inputs, each checked against float64 on sampled rows first, with the outputs
poisoned. Some of our kernels start while the launch before them ends (programmatic dependent launch): they wait for
its results before they read or write, but the writes ask for their inputs to be brought into the L2 before that.

`best peer` is the fastest published kernel, or sequence of kernels, for the same work on the same cache format,
`ratio` our time over its time: below 1 we are faster. `floor` is the larger of bytes over the measured rate of a copy
and FLOPs over the measured rate of a matmul, each needed byte once. `must` and `aim` are what the project promises of
the ratio, and what it is after. Rows where we lose are shown like all others. `error` is relative, against float64;
that of the writes is the rounding of e4m3."""

SECTIONS = {
    "decode": (
        "Sparse attention, decode rows over the FP8 cache",
        "2048 slots a row. b: requests, s: rows of each, h: heads, then the context.",
    ),
    "prefill8": (
        "Sparse attention, prefill rows over the FP8 cache",
        "Causal, the last rows of the context. The peers bring the whole context to bfloat16 first: both passes are "
        "one figure.",
    ),
    "topk": (
        "Top-2048",
        "Rows x scores. The peers return positions in any order; ours also sorts them, maps them to slots, counts "
        "them and fills the tail, in the same launch.",
    ),
    "idxdec": ("Index scores, decode rows", "Read from the pages. b: requests, n: rows of each, then the context."),
    "idxpre": (
        "Index scores, prefill rows",
        "Rows x keys, causal. The peers gather the keys from their pages first: both passes are one figure.",
    ),
    "writes": (
        "Writes of one layer",
        "T: tokens. `layer` is all of them; ours is one launch and also quantises the index queries, which the peers' "
        "figure does not contain. The other rows are single ops.",
    ),
    "chain": (
        "One layer's decode step between its projections",
        "Writes, index scores, top-k, slots, attention. b: requests, then the context, h: heads. Ours also quantises "
        "the index queries. The floor adds those of scores and attention.",
    ),
}
UNITS = {"_gbs": "GB/s", "_tflops": "TFLOP/s", "_us": "us"}


@dataclass(frozen=True)
class Line:
    """One case: ours beside the best peer."""

    section: str
    case: str
    ours: Row | None
    best: Row | None
    others: tuple[Row, ...]  # peers that were slower, other formats, parts
    reason: str  # why there is no time of ours

    @property
    def promise(self) -> Promise | None:
        return promise_of(self.section, self.case)

    @property
    def ratio(self) -> float | None:
        return self.ours.us / self.best.us if self.ours and self.best and self.ours.right else None

    @property
    def floor_us(self) -> float:
        row = self.ours or self.best or next(iter(self.others), None)
        return row.floor_us if row else math.nan


def lines_of(run: Run) -> list[Line]:
    """All cases in the order they were measured."""
    cases = dict.fromkeys((row.section, row.case) for row in run.rows)
    reasons = {(item.section, item.case): item.reason for item in run.failures if item.contender.startswith("ours")}
    lines = []
    for section, case in cases:
        rows = [row for row in run.rows if (row.section, row.case) == (section, case)]
        best = _fastest(row for row in rows if row.role == PEER and row.right)
        ours = _fastest(row for row in rows if row.role == OURS)
        others = tuple(row for row in rows if row is not best and row is not ours)
        lines.append(Line(section, case, ours, best, others, reasons.get((section, case), "")))
    return lines


def _fastest(rows: Iterable[Row]) -> Row | None:
    """A right answer before a fast one."""
    return min(rows, key=lambda row: (not row.right, row.us), default=None)


def shown_us(us: float) -> str:
    """Four digits, at most two of them behind the point."""
    if math.isnan(us):
        return "-"
    return f"{us:.0f}" if us >= 1000 else f"{us:.1f}" if us >= 100 else f"{us:.2f}"


def _row_text(row: Row) -> str:
    return f"{shown_us(row.us)}{'' if row.right else ' WRONG'}"


def _ours_text(line: Line) -> str:
    if line.ours is None:
        return "-"
    variant = line.ours.contender.partition(", ")[2]
    return _row_text(line.ours) + (f" ({variant})" if variant else "")


def _ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _cells(line: Line) -> list[str]:
    promise = line.promise
    return [
        line.case,
        _ours_text(line),
        f"{_row_text(line.best)} ({line.best.contender})" if line.best else "-",
        f"{shown_us(line.floor_us)}",
        _ratio_text(line.ratio),
        f"{promise.must:.2f}" if promise else "-",
        f"{promise.aim:.2f}" if promise else "-",
        line.ours.error if line.ours else "-",
    ]


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else None


def _promise_rows(lines: list[Line]) -> Iterable[list[str]]:
    """A line for each promise: the mean over its cases, and the worst of them."""
    for promise in PROMISES:
        covered = [line for line in lines if line.promise is promise]
        ratios = [line.ratio for line in covered if line.ratio is not None]
        mean, worst = geometric_mean(ratios), max(ratios, default=None)
        complete = worst is not None and len(ratios) == len(covered)
        yield [
            promise.work,
            f"{len(ratios)} of {len(covered)}",
            _ratio_text(mean),
            _ratio_text(worst),
            f"{promise.must:.2f}",
            f"{promise.aim:.2f}",
            _outcome(worst, promise) if complete and worst is not None else "-",
        ]


def _outcome(worst: float, promise: Promise) -> str:
    if worst <= promise.aim:
        return "aim reached"
    return "kept" if worst <= promise.must else "not kept"


def _other_rows(lines: list[Line]) -> Iterable[list[str]]:
    names = {OTHER_FORMAT: "other format", PART: "part", PEER: "peer", OURS: "ours"}
    for line in lines:
        for row in line.others:
            yield [line.case, row.contender, names[row.role], _row_text(row), row.error]


HEAD = ["case", "ours us", "best peer us", "floor us", "ratio", "must", "aim", "our error"]


def _sections(lines: list[Line]) -> list[str]:
    page = []
    for section, (title, note) in SECTIONS.items():
        here = [line for line in lines if line.section == section]
        if here:
            page += [f"## {title}", "", *textwrap.wrap(note, 119), "", *_table(HEAD, map(_cells, here)), ""]
            others = list(_other_rows(here))
            if others:
                page += ["Other contenders:", "", *_table(["case", "contender", "role", "us", "error"], others), ""]
    return page


def _names(run: Run) -> list[str]:
    """What is not in the tables, and why."""
    found = [f"* {name}: {reason}" for name, reason in run.missing.items()]
    failed: dict[tuple[str, str, str], list[str]] = {}
    for item in run.failures:
        if not item.reason.endswith("is missing"):
            failed.setdefault((item.section, item.contender, item.reason), []).append(item.case)
    found += [f"* {section}, {name}, {', '.join(cases)}: {why}" for (section, name, why), cases in failed.items()]
    return ["## Not measured", "", *found, ""] if found else []


def _ceiling(name: str, value: float) -> tuple[str, str]:
    """A line of the machine's table."""
    unit = next((ending for ending in UNITS if name.endswith(ending)), "")
    words = name.removesuffix(unit).replace("_", " ")
    return (words, f"{value:.0f}" if not unit else f"{value:.0f} {UNITS[unit]}" if value > 100 else f"{value:.2f} us")


def markdown(run: Run, command: str, source: Path) -> str:
    """The whole page."""
    lines = lines_of(run)
    facts = run.facts | dict(_ceiling(name, value) for name, value in run.ceilings.items())
    facts |= {f"repeats: {name}": outcome for name, outcome in run.repeats.items()}
    page = ["# Benchmarks of the CUDA ops", "", "Written by the command below; do not edit.", "", f"    {command}", ""]
    page += [
        f"The figures: `{source.as_posix()}`. The CPU's: [benchmarks.md](benchmarks.md).",
        "",
        *NOTES.splitlines(),
    ]
    page += ["", *_table(["machine", ""], ([name, value] for name, value in facts.items())), ""]
    page += ["## What is promised", "", "Mean and worst ratio over the cases of each work; the cases are below.", ""]
    head = ["work", "cases", "mean", "worst", "must", "aim", "outcome"]
    page += [*_table(head, _promise_rows(lines)), "", *_sections(lines), *_names(run)]
    return "\n".join(page)


def summary(run: Run) -> str:
    """For the terminal: every case, and the promises."""
    lines = lines_of(run)
    rows = [[line.section, *_cells(line), line.reason] for line in lines]
    text = ["", ", ".join(f"{name} {value}" for name, value in run.facts.items())]
    text += [" | ".join(row) for row in rows]
    text += ["", *(" | ".join(row) for row in _promise_rows(lines))]
    text += [f"missing: {name}: {reason}" for name, reason in run.missing.items()]
    return "\n".join([*text, f"seconds: {run.seconds}"])
