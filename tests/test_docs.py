"""What the pages say is true: paths exist, examples run, tables equal the code."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.attention.select import select_backend
from fastdeploy_dsa.cache_layout import CACHE_FORMATS, index_layout, latent_layout
from fastdeploy_dsa.cli import build_parser
from fastdeploy_dsa.config import MODEL_TYPE_OF_ARCHITECTURE, ModelConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
PATH_LIKE = re.compile(r"`((?:fastdeploy_dsa|cache_manager|custom_ops|tests|scripts|docs)/[\w./*-]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [ROOT / path for path in PATH_LIKE.findall(text)] + [page.parent / link for link in LINK.findall(text)]
    missing = [str(path) for path in named if not list(path.parent.glob(path.name or "*"))]
    assert missing == []


def test_the_readme_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_command_line_in_the_pages_parses() -> None:
    parser = build_parser()
    commands = [
        line.strip()
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("    fastdeploy-dsa ")
    ]
    assert len(commands) >= 2
    for command in commands:
        arguments = re.findall(r'"[^"]*"|\S+', command)[1:]
        try:
            parser.parse_args([argument.strip('"') for argument in arguments])
        except (SystemExit, argparse.ArgumentError) as error:  # argparse exits on an argument it does not know
            pytest.fail(f"{command}: {error}")


def test_the_byte_table_equals_the_layouts() -> None:
    rows = {
        row[0]: (int(row[1]), int(row[2]))
        for row in re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|$", README, re.MULTILINE)
    }
    assert rows == {
        name: (latent_layout(name, 512, 64).token_bytes, index_layout(name, 128).token_bytes) for name in CACHE_FORMATS
    }


def test_the_support_matrix_names_what_the_selector_serves() -> None:
    (line,) = re.findall(r"^\| architectures \| (.*) \|$", README, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", line)) == set(MODEL_TYPE_OF_ARCHITECTURE)
    demo = ModelConfig.from_pretrained(ROOT / "fastdeploy_dsa" / "demo_model")
    assert select_backend(demo, "cpu") is DSAAttentionBackend


def test_the_two_commands_of_the_readme_are_those_of_the_ci_script() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("pip install -e '.[cpu,test]'", "python -m pytest"):
        assert command in README
    assert "pip install --quiet -e '.[cpu,test]'" in ci
    assert "python -m pytest" in ci


def test_the_benchmark_page_was_made_on_an_idle_machine_and_keeps_its_promises() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "BUSY" not in page
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    promised = {
        row[1]: (float(row[4]), float(row[5])) for row in rows if len(row) == 8 and re.fullmatch(r"\d+", row[5])
    }
    # Attention with several rows or fp8: 7, over windows and entries: 10; top-k: 1; index scores: 4; compressor: 7.
    assert len(promised) == 29
    assert {name: figures for name, figures in promised.items() if figures[0] < figures[1]} == {}


def test_drafting_keeps_what_the_page_promises() -> None:
    text = (ROOT / "docs" / "mtp.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.count(" | ") == 9]
    promised = {tuple(row[:3]): (float(row[7].split()[0]), row[8]) for row in rows if row[8][:1].isdigit()}
    assert len(promised) == 6  # 1 to 4 drafts for one request; wrong drafts for 1 and 8
    assert {name: figures for name, figures in promised.items() if figures[0] < float(figures[1])} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_of_a_page_is_still_to_be_filled_in(page: Path) -> None:
    assert re.findall(r"^[A-Z]+_[A-Z0-9_]+$|\bTBD\b|\?\?\?", page.read_text(encoding="utf-8"), re.MULTILINE) == []
