"""docs/logits.md: the options are all there, and the example prints what it shows."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from fastdeploy_dsa.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "logits.md").read_text(encoding="utf-8")


def test_the_table_of_options_is_complete() -> None:
    (commands,) = (one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction))
    parser = commands.choices["logits"]
    options = {(action.option_strings or [action.metavar])[-1] for action in parser._actions} - {"--help"}
    assert set(re.findall(r"^\| `(--[\w-]+|MODEL)` \|", PAGE, re.MULTILINE)) == options


def test_the_example_prints_what_the_page_shows(tmp_path: Path) -> None:
    example, shown = PAGE.split("```python\n")[1].split("```\n\nprints\n\n")
    echo, *commands = re.findall(r"^    (echo .*|fastdeploy-dsa .*)$", PAGE, re.MULTILINE)
    _, ids, _, name = shlex.split(echo)
    (tmp_path / name).write_text(ids, encoding="utf-8")
    (tmp_path / "fastdeploy_dsa").symlink_to(ROOT / "fastdeploy_dsa")
    assert len(commands) == 2
    for command in commands:
        arguments = [sys.executable, "-P", "-m", "fastdeploy_dsa", *shlex.split(command)[1:]]
        subprocess.run(arguments, cwd=tmp_path, check=True, timeout=120)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [line.removeprefix("    ") for line in shown.splitlines()]
