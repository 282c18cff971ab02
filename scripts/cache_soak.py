"""Random calls to the cache manager against a model, for as long as one likes.

    python scripts/cache_soak.py [--steps 200000] [--steps-per-run 80]

The machine and its laws are those of tests/cache_manager/machine.py. Prints how often each thing happened. A failure
is printed with the calls that led to it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.cache_manager.machine import CacheMachine, run_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--steps-per-run", type=int, default=80)
    args = parser.parse_args()
    begin = perf_counter()

    def report() -> None:
        print(f"{CacheMachine.events['steps']} steps, {perf_counter() - begin:.0f} s", flush=True)

    run_steps(args.steps, num_runs=500, steps_per_run=args.steps_per_run, on_progress=report)
    print("| event | times |\n| --- | --- |")
    for event, times in sorted(CacheMachine.events.items()):
        print(f"| {event} | {times} |")


if __name__ == "__main__":
    main()
