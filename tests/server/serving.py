"""A server in a thread of the test, and what its counters say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from fastdeploy_dsa.server.serving import Server, ServerOptions

Metrics = dict[str, float]

MAX_MODEL_LEN = 512

# What must be as before when nothing is left to do.
STATE = (
    "requests_running",
    "requests_waiting",
    "cache_blocks{device,owned}",
    "cache_blocks{host,owned}",
)


@contextmanager
def running(model: Path, *, options: dict[str, Any] | None = None, **llm_options: Any) -> Iterator[Server]:
    """A server on a free port, its engine checking every block after every step; ended by the end of the block."""
    server = Server(model, ServerOptions(port=0, **(options or {})), check_integrity=True, **llm_options)
    thread = Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"


def root(server: Server) -> str:
    return server.url.removesuffix("/v1")


def sync_client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def metrics(server: Server) -> Metrics:
    """The counters by name and labels, such as "cache_blocks{device,free}"."""
    text = httpx.get(f"{root(server)}/metrics", timeout=30).raise_for_status().text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [sample.labels[name] for name in sorted(sample.labels, reverse=True)]
            name = sample.name.removeprefix("fastdeploy_dsa_")
            found[name + (f"{{{','.join(labels)}}}" if labels else "")] = sample.value
    return found


def assert_nothing_is_left(server: Server, before: Metrics, *, within: float = 10.0) -> Metrics:
    """Wait until no request runs or waits, and see that no block has an owner and none is lost.

    Returns:
        The counters then.
    """
    deadline = monotonic() + within
    while True:
        after = metrics(server)
        if all(after[name] == 0 for name in STATE) or monotonic() > deadline:
            break
        sleep(0.02)
    assert {name: after[name] for name in STATE} == dict.fromkeys(STATE, 0.0)
    assert server.engine.num_unfinished == 0
    assert _num_blocks(after) == _num_blocks(before)
    return after


def _num_blocks(found: Metrics) -> float:
    return sum(found[f"cache_blocks{{device,{state}}}"] for state in ("owned", "evictable", "free"))
