"""The sections in a child process: a device error or a hang costs one contender, or at worst one section.

The parent imports torch and never touches the device. When the child dies or falls silent, another is forked that goes
on without the contender that was running.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.gpu_benchmark import (
    ceilings,
    chain,
    decode,
    index_decode,
    index_prefill,
    prefill,
    repeats,
    topk,
    writes,
)
from scripts.gpu_benchmark.ours import Ours
from scripts.gpu_benchmark.peers import Peers
from scripts.gpu_benchmark.record import Journal, Run
from scripts.gpu_benchmark.timing import DEVICE_ERROR_EXIT, Timer
from scripts.gpu_benchmark.tools import Inputs, Tools, index_queries
from scripts.gpu_benchmark.work import MissingContender

MODULES = {
    "decode": decode,
    "topk": topk,
    "idxdec": index_decode,
    "writes": writes,
    "chain": chain,
    "prefill8": prefill,
    "idxpre": index_prefill,
}
SECTIONS = ("compile", "ceil", *MODULES, "repeats")
NO_TIME = "no time left"
_MAX_STARTS = 4
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Options:
    """Of a run; device: "cuda", but for tests of this code."""

    peers: Path | None
    library: Path | None
    quick: bool
    budget_ms: float
    stall_seconds: float  # without a word from a section: it hangs
    section_seconds: float
    device: str = "cuda"


def run_sections(names: list[str], options: Options, run: Run, save: Callable[[Run], None]) -> None:
    """Add what the sections find to the run, and save it after each of them."""
    with tempfile.TemporaryDirectory() as folder:
        waiting = [Journal(Path(folder) / f"{name}.jsonl", name) for name in names]
        starts: Counter[str] = Counter()
        while waiting:
            process = multiprocessing.get_context("fork").Process(
                target=_sections, args=(list(waiting), options, dict(run.ceilings))
            )
            process.start()
            ended = _follow(process, waiting, options, lambda journal: _gathered(journal, run, save))
            if waiting:
                journal = waiting[0]
                starts[journal.section] += 1
                if _is_hopeless(journal, ended, starts[journal.section]):
                    journal.failed("section", "all", ended)
                    _gathered(waiting.pop(0), run, save)


def _gathered(journal: Journal, run: Run, save: Callable[[Run], None]) -> None:
    journal.gather(run)
    print(f"-- {journal.section}: {run.seconds.get(journal.section, math.nan):.1f} s", flush=True)
    save(run)


def _follow(
    process: multiprocessing.process.BaseProcess,
    waiting: list[Journal],
    options: Options,
    gathered: Callable[[Journal], None],
) -> str:
    """Take finished sections off the list until the process ends; how it did."""
    begun = heard = time.monotonic()
    size = -1
    while waiting:
        process.join(_POLL_SECONDS)
        now, journal = time.monotonic(), waiting[0]
        if journal.is_done():
            gathered(waiting.pop(0))
            begun = heard = now
            size = -1
        elif not process.is_alive():
            reasons = {DEVICE_ERROR_EXIT: "a device error"}
            return reasons.get(process.exitcode or 0, f"exit status {process.exitcode}")
        elif journal.size() != size:
            heard, size = now, journal.size()
        elif now - begun > options.section_seconds or now - heard > _patience(journal, options):
            process.kill()
            process.join(5)
            return NO_TIME if now - begun > options.section_seconds else f"silent for {now - heard:.0f} s"
    process.join(10)
    return "done"


def _patience(journal: Journal, options: Options) -> float:
    return options.section_seconds if journal.section == "compile" else options.stall_seconds


def _is_hopeless(journal: Journal, ended: str, starts: int) -> bool:
    """Whether to give the section up; else it goes on without the contender that was running."""
    culprit = journal.last_begun()
    print(f"{journal.section:9s}| {ended}{': ' + ', '.join(culprit) if culprit else ''}", flush=True)
    if culprit:
        journal.failed(*culprit, reason=ended)
    return ended == NO_TIME or starts >= _MAX_STARTS or (culprit is None and ended != "a device error")


def _sections(journals: list[Journal], options: Options, found: dict[str, float]) -> None:
    """What the child does."""
    torch.set_default_device(options.device)
    for journal in journals:
        start = time.monotonic()
        torch.manual_seed(0)
        _section(journal, options, found)
        for event in journal.events():
            found.update(event.get("values", {}) if event["kind"] == "ceilings" else {})
        journal.write("done", seconds=round(time.monotonic() - start, 2))
        gc.collect()
        if journal.section != "compile":  # no device may be in use before that has forked
            torch.cuda.empty_cache()


def _section(journal: Journal, options: Options, found: dict[str, float]) -> None:
    timer = Timer(journal, found, options.budget_ms)
    tools = Tools(Peers(options.peers), _our_library(options, journal), timer, options.quick)
    if journal.section == "ceil":
        ceilings.measure(journal, options.quick)
    elif journal.section == "compile":
        _compile(tools)
    elif journal.section == "repeats":
        repeats.measure(journal, tools)
    else:
        for work in MODULES[journal.section].works(tools):
            timer.measure(work)


def _our_library(options: Options, journal: Journal) -> Ours:
    try:
        return Ours(options.library)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        journal.missing("our library", f"{type(error).__name__}: {error}"[:300])
        print(f"our library: {error!r}", flush=True)
        return Ours(None)


def _compile(tools: Tools) -> None:
    """DeepGEMM compiles a kernel at its first use: small cases of all that are needed, at the same time.

    Nothing is left to do where the folder it compiles into has been kept from another run.
    """
    kept = os.environ.get("DG_JIT_CACHE_DIR")
    if kept and any(Path(kept).rglob("*.cubin")):
        return
    jobs = (_compile_paged(tools, 1), _compile_paged(tools, 2), _compile_contiguous(tools))
    children = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            os._exit(_outcome(job))
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def _outcome(job: Callable[[], object]) -> int:
    try:
        job()
        torch.cuda.synchronize()
    except (MissingContender, RuntimeError, OSError) as error:
        print(f"compile  | {error!r}"[:200], flush=True)
        return 1
    return 0


def _compile_paged(tools: Tools, next_n: int) -> Callable[[], object]:
    def job() -> None:
        shape = index_decode.Shape(1, next_n, 4096)
        work = index_decode.work_of(shape, Tools(tools.peers, tools.ours, tools.timer, True))
        work.contenders[0].make(work.sets[0])()

    return job


def _compile_contiguous(tools: Tools) -> Callable[[], object]:
    def job() -> None:
        context = 4096
        case = Inputs(
            query=index_queries(256),
            weights=torch.randn(256, 64),
            keys=index_queries(context // 64).view(context, 128),
            scales=torch.rand(context),
            starts=torch.zeros(256, dtype=torch.int32),
            ends=torch.full((256,), context, dtype=torch.int32),
        )
        tools.peers.contiguous_logits(**vars(case))()

    return job
