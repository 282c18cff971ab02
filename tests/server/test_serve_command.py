"""`fastdeploy-dsa serve` as a user runs it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import httpx
import openai
import pytest

from tests.kit.byte_tokenizer import save_byte_tokenizer
from tests.kit.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    save_byte_tokenizer(folder)
    return folder


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, once it says so."""
    command = [sys.executable, "-m", "fastdeploy_dsa", "serve", "--port", "0", *map(str, arguments)]
    # A background job of a shell ignores SIGINT, and so would what it starts; behind a handler here it does not.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line.startswith("serving "), line + process.stderr.read()
            yield process, line.split()[-1]
        finally:
            process.kill()
            signal.signal(signal.SIGINT, inherited)


def complaint(*arguments: object, environment: dict[str, str] | None = None) -> str:
    """The one line that a mistake gives."""
    done = subprocess.run(
        [sys.executable, "-m", "fastdeploy_dsa", "serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | (environment or {}),
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line.removeprefix("fastdeploy-dsa: error: ")


@pytest.mark.parametrize(("ending", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_it_serves_under_its_name_until_a_signal(
    model: Path, tmp_path: Path, ending: signal.Signals, status: int
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}", encoding="utf-8")
    options = ["--served-model-name", "some/name", "--max-model-len", 64, "--chat-template", template]
    with serving("--model", model, "--num-threads", 1, *options) as (process, url):
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            (card,) = client.models.list().data
            assert (card.id, card.max_model_len) == ("some/name", 64)  # type: ignore[attr-defined]
            assert client.models.retrieve("some/name") == card
            answer = client.chat.completions.create(model=card.id, messages=[{"role": "user", "content": "abc"}])
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == 3
            stream = client.completions.create(
                model=card.id, prompt="a", stream=True, max_tokens=5, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            begin = monotonic()
            process.send_signal(ending)
            assert len(list(stream)) <= 5  # what runs may end
        assert process.wait(20) == status
        assert monotonic() - begin < 20
        assert process.stderr is not None
        assert process.stderr.read() == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


def test_a_mistake_is_one_line(model: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert complaint("--model", absent).endswith(f"(nothing is downloaded), got '{absent}'")
    assert complaint("--model", model, "--max-model-len", 1) == "max_model_len: expected an int of 2 to 256, got 1"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = complaint("--model", model, "--port", port)
        assert words == f"cannot listen on 127.0.0.1:{port}: Address already in use"


def test_without_the_extra_the_line_says_how_to_get_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError('No module', name='starlette')\n")
    line = complaint("--model", model, environment={"PYTHONPATH": str(tmp_path)})
    assert line == "serve needs the extra 'server': pip install 'fastdeploy-dsa[server]' (No module)"
