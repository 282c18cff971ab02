"""Time the CUDA ops beside the best published kernels for the same work, on one Hopper GPU.

    python scripts/bench_gpu.py --peers DIR --library libfastdeploy_dsa.so --json scripts/gpu_results/NAME.json
    python scripts/bench_gpu.py --markdown docs/benchmarks_gpu.md --from scripts/gpu_results/NAME.json

The first needs torch and Triton; DIR holds the peers' binaries (none is in this repository; what is missing is named
and skipped). --quick measures only the works that promises are made about. The second needs neither a GPU nor torch.

Every contender gets the same input sets, enough of them that their bytes exceed 2.5 times the L2; its result is
checked against float64 on sampled rows, with the outputs poisoned before; then a CUDA graph that holds a launch for
every set is replayed. The figure is the median replay over the launches it holds.

Sections: compile (the peers' kernels that are compiled at first use), ceil (what the device can do), writes, topk,
idxdec and idxpre (index scores of decode and prefill), decode and prefill8 (sparse attention over the FP8 cache),
chain (one layer's decode step), repeats (the same bits every time).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu_benchmark.record import Run  # noqa: E402 - found through the path above
from scripts.gpu_benchmark.report import markdown, summary  # noqa: E402


def absolute(path: str) -> Path:
    """A library without a folder in its name would be looked for elsewhere."""
    return Path(path).resolve()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=absolute, help="folder of the peers' binaries")
    parser.add_argument("--library", type=absolute, help="our library, built with CUDA")
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--sections", nargs="+", help="some of the sections (default: all)")
    parser.add_argument("--quick", action="store_true", help="only what promises are made about")
    parser.add_argument("--budget-ms", type=float, default=12, help="time of replays for a contender (default 12)")
    parser.add_argument("--stall-seconds", type=float, default=20, help="a contender silent for longer is ended")
    parser.add_argument("--section-seconds", type=float, default=60, help="a section that takes longer is ended")
    parser.add_argument("--revision", help="of the sources (default: what git says)")
    parser.add_argument("--markdown", type=Path, help="write the page here; needs --from")
    parser.add_argument("--from", dest="source", type=Path, help="the JSON of a run")
    return parser.parse_args()


def output_of(*command: str) -> str:
    """What a command prints; "unknown" where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def facts(options: argparse.Namespace) -> dict[str, str]:
    """What identifies the run."""
    query = "nvidia-smi", "--format=csv,noheader"
    found = {
        "device": output_of(*query, "--query-gpu=name"),
        "driver": output_of(*query, "--query-gpu=driver_version"),
        "date": date.today().isoformat(),
        "revision": options.revision or output_of("git", "rev-parse", "--short", "HEAD"),
    }
    if options.library:
        content = options.library.read_bytes()
        found["library bytes"] = str(len(content))
        found["library sha256"] = hashlib.sha256(content).hexdigest()[:16]
    return found


def measure(options: argparse.Namespace) -> Run:
    start = time.monotonic()
    runner = importlib.import_module("scripts.gpu_benchmark.runner")  # imports torch
    names = options.sections or list(runner.SECTIONS)
    if unknown := set(names) - set(runner.SECTIONS):
        raise SystemExit(
            f"--sections: expected some of {', '.join(runner.SECTIONS)}, got {', '.join(sorted(unknown))}"
        )
    run = Run(facts=facts(options))
    run.seconds["start"] = round(time.monotonic() - start, 2)
    run.facts["cases"] = "those of the promises" if options.quick else "all"
    settings = runner.Options(
        peers=options.peers,
        library=options.library,
        quick=options.quick,
        budget_ms=options.budget_ms,
        stall_seconds=options.stall_seconds,
        section_seconds=options.section_seconds,
    )
    runner.run_sections(names, settings, run, lambda so_far: so_far.save(options.json) if options.json else None)
    return run


def main() -> int:
    options = parse_arguments()
    if options.markdown:
        if not options.source:
            raise SystemExit("--markdown: expected the JSON of a run with --from")
        command = f"python scripts/bench_gpu.py --markdown {options.markdown} --from {options.source}"
        options.markdown.write_text(markdown(Run.load(options.source), command, options.source), encoding="utf-8")
        return 0
    print(summary(measure(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
