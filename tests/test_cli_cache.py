"""The demonstrations in docs/cache_manager.md: each command is run and compared with the output below it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeploy_dsa import cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cache_manager.md"
SECTION = PAGE.read_text(encoding="utf-8").partition("\n## In the engine\n")[2].partition("\n## ")[0]
DEMONSTRATIONS = re.findall(r"^    fastdeploy-dsa (.*)\n\n((?:    .*\n)+)", SECTION, re.MULTILINE)
STATS = re.compile(r"^(looked up|computed|gave way|device blocks|host blocks|evicted|moved|failed copies) +(.*)$")


def stats_of(output: str) -> dict[str, str]:
    """The lines of the statistics; the texts before them may differ where other kernels round otherwise."""
    found = [STATS.match(line.strip()) for line in output.splitlines()]
    return {match[1]: match[2] for match in found if match is not None}


def test_the_page_demonstrates_prefixes_and_swapping() -> None:
    commands = [command for command, _ in DEMONSTRATIONS]
    assert len(commands) == 5
    assert sum("--swap-space" in command for command in commands) == 2
    assert all("--stats" in command for command in commands)


@pytest.mark.parametrize(("command", "shown"), DEMONSTRATIONS, ids=range(len(DEMONSTRATIONS)))
def test_a_demonstration_of_the_page_is_what_happens(command: str, shown: str) -> None:
    arguments = [sys.executable, "-m", "fastdeploy_dsa", *shlex.split(command)]
    done = subprocess.run(arguments, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert stats_of(done.stdout) == {}, "statistics belong on stderr"
    assert len(stats_of(shown)) == 8
    assert stats_of(done.stderr) == stats_of(shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--swap-space", "1 potato"], "swap_space: expected bytes, such as 1048576 or '512MiB', got '1 potato'"),
        (["--swap-space", "1"], "swap_space: expected 0 or room for a block of 64 tokens"),
        (["--num-blocks", "0"], "num_blocks: expected an int of 1 or more, got 0"),
        (["--block-size", "0"], "block_size: expected an int of 1 or more, got 0"),
        (["--max-num-seqs", "0"], "max_num_seqs: expected an int of 1 or more, got 0"),
    ],
)
def test_a_bad_cache_option_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main(["generate", *arguments, "a prompt"]) == cli.USER_ERROR
    assert message in capsys.readouterr().err
