"""docs/server.md says what the server does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import openai

import fastdeploy_dsa.server
from fastdeploy_dsa.server.protocol import _UNSUPPORTED, _WITHOUT_EFFECT, ChatBody, CompletionBody
from fastdeploy_dsa.server.serving import Server

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a line."""
    table = PAGE.split(f"\n{heading}\n", 1)[1].split("\n\n", 1)[0].splitlines()
    return [line.strip("| ").split(" | ") for line in table[1:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def test_the_example_runs(server: Server, client: openai.OpenAI) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    example = example.replace("http://127.0.0.1:8000/v1", server.url)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    assert done.stdout == " 4812"


def test_the_table_of_parameters_is_complete() -> None:
    table = rows("| parameter | |")
    supported = {name for row in table[:-2] for name in names(row[0])}
    fields = {*CompletionBody.model_fields, *ChatBody.model_fields} - {"model", "prompt", "messages", "best_of"}
    assert {name.partition(".")[0] for name in supported} == fields
    assert set(names(table[-2][0])) <= _WITHOUT_EFFECT
    assert set(names(table[-1][0])) - {"best_of"} <= set(_UNSUPPORTED)


def test_the_table_of_errors_names_every_code() -> None:
    documented = {code for row in rows("| status | `code` of the error object | when |") for code in names(row[1])}
    folder = Path(fastdeploy_dsa.server.__file__).parent
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    used = set(re.findall(r'code="(\w+)"', sources))
    assert documented == used - {"client_closed_request"}  # which nobody is left to read
