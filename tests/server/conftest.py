"""One server of the demo model for all tests that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from fastdeploy_dsa import LLM
from fastdeploy_dsa.installation import DEMO_MODEL
from fastdeploy_dsa.server.serving import Server
from tests.server.serving import MAX_MODEL_LEN, assert_nothing_is_left, metrics, running, sync_client


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """Of the demo model; its cache has room for a few requests only, so that most wait."""
    with running(
        DEMO_MODEL, num_threads=1, max_model_len=MAX_MODEL_LEN, num_blocks=32, options={"max_waiting": 400}
    ) as found:
        yield found


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's own client; after the test the server is as it was."""
    before = metrics(server)
    with sync_client(server) as found:
        yield found
    assert_nothing_is_left(server, before)


@pytest.fixture(scope="package")
def llm() -> LLM:
    """The same model without a server."""
    return LLM(DEMO_MODEL, num_threads=1)
