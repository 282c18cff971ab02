"""Thousands of random calls against a model of plain dicts; scripts/cache_soak.py makes many more."""

from __future__ import annotations

from tests.cache_manager.machine import CacheMachine, run_steps

NUM_STEPS = 5000
SUCCESSES = {"opened", "computed", "forked", "swapped out", "swapped in", "device hit", "reset", "resized"}
SUCCESSES |= {"started at a snapshot", "snapshot from the host", "hit shortened"}
FAILURES = {"OutOfBlocks", "TransferFailed", "TransferTimeout", "host allocation failed", "misuse"}


def test_random_use_keeps_the_laws_and_the_bytes() -> None:
    CacheMachine.events.clear()
    for num_steps in (NUM_STEPS, 2 * NUM_STEPS, 3 * NUM_STEPS):  # more only if something rare has not happened yet
        run_steps(num_steps, num_runs=30, steps_per_run=50)
        if CacheMachine.events.keys() >= SUCCESSES | FAILURES:
            break
    print(dict(CacheMachine.events))
    assert CacheMachine.events.keys() >= SUCCESSES | FAILURES, "the rules do not reach what they are for"
