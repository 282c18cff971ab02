"""Time the ops beside the same work composed from Paddle's own ops in float32, on the same cores and in one run.

    python scripts/bench_ops.py                                   a table
    python scripts/bench_ops.py --markdown docs/benchmarks.md     the table and how it was made
    python scripts/bench_ops.py --only sparse_mla --json out.json

Every answer is checked against the float64 definition before it is timed; a wrong one ends the run with exit status 1.
Speed never does. Ours and the peer take turns. Before every single run a buffer larger than all caches is written, so
that both find their inputs in memory; the worker threads of the other side are given time to fall asleep (those of
Paddle's OpenMP runtime spin on their core for 200 ms); and a small call wakes the threads of its own side, which takes
up to 10 ms on virtual machines. The bound of a row is the larger of its bytes over the measured rate of a copy and
its FLOPs over the measured rate of a float32 matmul.
"""

# ruff: noqa: E402 - Paddle's math libraries read their thread counts when they load

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = str(len(os.sched_getaffinity(0)))  # Paddle itself would choose one thread
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.op_benchmark.attention import sparse_mla_works
from scripts.op_benchmark.compressed_mla import compressed_mla_works
from scripts.op_benchmark.indexer import index_select_works, indexer_works, topk_works
from scripts.op_benchmark.kv_compress import kv_compress_works
from scripts.op_benchmark.report import machine, markdown, show
from scripts.op_benchmark.timing import Rates, Work, measure
from scripts.op_benchmark.writers import writer_works

WORKS: dict[str, Callable[[], Iterator[Work]]] = {
    "sparse_mla": sparse_mla_works,
    "topk_slots": topk_works,
    "indexer_logits": indexer_works,
    "index_select": index_select_works,
    "writers": writer_works,
    "kv_compress": kv_compress_works,
    "compressed_mla": compressed_mla_works,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS), help="parts of the table")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row, at least nine runs (default 1)")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    load, rates = os.getloadavg()[0], Rates.measured()
    results, wrong = [], []
    for part in options.only:
        rates = rates.best(Rates.measured())
        for work in WORKS[part]():
            print(f"{work.op}: {work.name}", file=sys.stderr, flush=True)
            try:
                results.append(measure(work, options.seconds))
            except AssertionError as error:
                wrong.append(f"{work.op}: {work.name}: {error}")
    found = machine(rates.best(Rates.measured()), load)
    show(found, results)
    if wrong:
        print("wrong answers:", *wrong, sep="\n", file=sys.stderr)
        return 1
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(
            markdown(found, results, f"python scripts/bench_ops.py --markdown {options.markdown}")
        )
    if options.json:
        options.json.write_text(
            json.dumps({"machine": asdict(found), "results": [asdict(result) for result in results]}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
