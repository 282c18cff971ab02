"""Calls that may kill the process, made in another one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def print_outcomes(attempts: Iterable[tuple[tuple[Any, ...], Callable[[], str]]]) -> None:
    """Print a line of JSON before and after each attempt.

    Args:
        attempts: Pairs of a key and a function that makes the attempt and returns what became of it.
    """
    for key, attempt in attempts:
        print(json.dumps([*key, "killed the process"]), flush=True)
        print(json.dumps([*key, attempt()]), flush=True)


def outcomes_of(module: str, *arguments: str) -> dict[tuple[Any, ...], str]:
    """What became of the attempts that a module's function `report` makes; those behind a crash are missing."""
    command = [sys.executable, "-c", f"import sys; from {module} import report; report(*sys.argv[1:])", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=300)
    lines = list(_lines(done.stdout))
    assert lines, done.stderr
    return {tuple(line[:-1]): line[-1] for line in lines}


def _lines(text: str) -> Iterator[list[Any]]:
    for line in text.splitlines():
        if line.startswith("["):
            yield json.loads(line)
