"""The table: what the machine is, and a line for every row."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import paddle
from rich.console import Console
from rich.table import Table

from fastdeploy_dsa.ops.library import C_LIBRARY
from scripts.op_benchmark.timing import CORES, Rates, Result, Timing
from tests.kit.headers import CLibrary
from tests.kit.implementations import CPU_ISAS

ROOT = Path(__file__).resolve().parent.parent.parent

NOTES = """\
Each op stands beside the same work composed from Paddle's own ops in float32: gather (and decoding by casts for fp8),
matmul, softmax or relu, matmul; `paddle.topk`. The fastest of several ways to compose it counts. All answers were
checked against the float64 definition first. Both sides took turns in one process, on the same cores, each single run
with cold caches, its own threads awake and the other side's asleep. Times are medians with quartiles. `bound` is the
larger of bytes over the copy rate and FLOPs over the matmul rate of this machine, `share` the bound over our time;
it exceeds 100 % where our kernels do more than Paddle's matmul, which sets the rate. `required` is what the project
promises; attention of one row over a cold float32 or bfloat16 cache, and of 64 heads over float32, was measured below
that and is not promised."""
COLUMNS = ("op", "case", "ours", "Paddle", "ratio", "required", "bound", "share")


@dataclass(frozen=True)
class Machine:
    """What the run found."""

    cpu: str
    isa: str
    threads: int
    paddle: str
    day: str
    revision: str
    load: float
    rates: Rates


def significant(seconds: float) -> str:
    """Milliseconds with three digits, never as a power of ten."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(timing: Timing) -> str:
    return f"{significant(timing.median)} ms ({significant(timing.low)} - {significant(timing.high)})"


def cells(result: Result, rates: Rates) -> tuple[str, ...]:
    """A row of COLUMNS."""
    ratio = f"{result.ratio:.1f}" if result.ratio else "-"
    peer = f"{milliseconds(result.peer)}, {result.peer_name}" if result.peer else "-"
    return (
        result.op,
        result.name,
        milliseconds(result.ours),
        peer,
        ratio,
        f"{result.required:.0f}" if result.required else "-",
        f"{significant(result.bound(rates))} ms",
        f"{100 * result.bound(rates) / result.ours.median:.0f} %",
    )


def machine(rates: Rates, load: float) -> Machine:
    """What there is to say about the machine."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    level = CLibrary(C_LIBRARY).call("dsa_cpu_isa")
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    return Machine(
        cpu=models[0] if models else platform.processor(),
        isa=CPU_ISAS[int(str(level)) - 1],
        threads=CORES,
        paddle=paddle.version.full_version,
        day=date.today().isoformat(),
        revision=git.stdout.strip() if git.returncode == 0 else "",
        load=load,
        rates=rates,
    )


def facts(found: Machine) -> dict[str, str]:
    """The machine in words."""
    busy = f"; BUSY with other work, so the times are not reliable: {CORES} cores" if found.load > CORES / 2 else ""
    return {
        "CPU": f"{found.cpu}, {found.isa}",
        "threads": f"{found.threads}, for our ops and for Paddle's alike",
        "load average at the start": f"{found.load:.2f}{busy}",
        "copy, read plus written": f"{found.rates.copy / 1e9:.1f} GB/s",
        "float32 matmul of Paddle": f"{found.rates.matmul / 1e9:.0f} GFLOP/s",
        "Paddle": found.paddle,
        "date": found.day,
        **({"revision": found.revision} if found.revision else {}),
    }


def markdown(found: Machine, results: list[Result], command: str) -> str:
    """The whole page."""
    lines = [
        "# Benchmarks of the ops",
        "",
        "Written by the command below; do not edit.",
        "",
        f"    {command}",
        "",
        *NOTES.splitlines(),
        "",
        "| machine | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in facts(found).items()),
        "",
        *table_lines(results, found.rates),
        "",
    ]
    return "\n".join(lines)


def table_lines(results: list[Result], rates: Rates) -> list[str]:
    """The table in markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(cells(result, rates) for result in results)]
    return [f"| {' | '.join(row)} |" for row in rows]


def show(found: Machine, results: list[Result]) -> None:
    """The table: drawn on a terminal, markdown elsewhere."""
    console = Console()
    console.print("; ".join(f"{name}: {value}" for name, value in facts(found).items()))
    if not console.is_terminal:
        print(*table_lines(results, found.rates), sep="\n")
        return
    table = Table(*COLUMNS)
    for result in results:
        table.add_row(*cells(result, found.rates))
    console.print(table)
