"""Many clients at once, some of whom vanish: every answer is right, and nothing of them is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from time import monotonic
from typing import Any

import httpx
import openai
import pytest

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.server.serving import Server
from tests.server.serving import MAX_MODEL_LEN, assert_nothing_is_left, metrics, root

MODEL = "demo_model"
NUM_STREAMS = 200
NUM_LEAVERS = 40
MAX_TOKENS = 8
# After which something hangs, also on two busy cores.
SECONDS = 150


def run(server: Server, *work: Coroutine[Any, Any, Any]) -> list[Any]:
    async def together() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*work), SECONDS)

    return asyncio.run(together())


def prompts() -> list[str]:
    """As in service: shared beginnings, different lengths, most prompts more than once."""
    rng = random.Random(2024)
    shared = ["".join(rng.choices("abcdefgh ", k=70)) for _ in range(4)]
    distinct = [f"{rng.choice(shared)}{number} {'word ' * rng.randrange(8)}" for number in range(32)]
    return rng.choices(distinct, k=NUM_STREAMS)


async def stream(client: openai.AsyncOpenAI, prompt: str) -> str:
    chunks = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, stream=True
    )
    return "".join([chunk.choices[0].text async for chunk in chunks])


async def refused(client: openai.AsyncOpenAI, kind: int) -> int:
    """One of the mistakes of other clients."""
    wrong = [
        {"model": "gpt-4", "prompt": "a"},
        {"model": MODEL, "prompt": "a" * MAX_MODEL_LEN},
        {"model": MODEL, "prompt": [300]},
        {"model": MODEL, "prompt": "a", "temperature": -1.0},
    ][kind]
    with pytest.raises(openai.APIStatusError) as caught:
        await client.completions.create(**wrong)  # type: ignore[call-overload]
    return caught.value.status_code


async def leave(client: httpx.AsyncClient, server: Server, number: int) -> int:
    """Ask for much more than is read, and close the connection: streamed or not, early or late.

    Returns:
        Events that were read.
    """
    body = {
        "model": MODEL,
        "prompt": f"leaver {number} " * 6,
        "max_tokens": 300,
        "ignore_eos": True,
        "stream": number % 4 != 3,
    }
    num_events = 0
    request = client.stream("POST", f"{root(server)}/v1/completions", json=body, timeout=SECONDS)
    if number % 4 == 3:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(request.__aenter__(), 1.0)
        return 0
    async with request as answer:
        assert answer.status_code == 200
        if number % 4 == 0:
            return 0  # while the request waits
        async for _ in answer.aiter_lines():
            num_events += 1
            if num_events == 4:
                break
    return num_events


def test_200_streams_beside_leavers_and_mistakes_are_right_and_leave_nothing(server: Server, llm: LLM) -> None:
    texts = prompts()
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    distinct = sorted(set(texts))
    expected = dict(zip(distinct, (output.text for output in llm.generate(distinct, params)), strict=True))
    before = metrics(server)

    async def everybody() -> tuple[list[str], list[int], list[int]]:
        limits = httpx.Limits(max_connections=None)
        async with (
            openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=SECONDS) as client,
            httpx.AsyncClient(limits=limits) as leavers,
        ):
            streams = asyncio.gather(*(stream(client, text) for text in texts))
            leaving = asyncio.gather(*(leave(leavers, server, number) for number in range(NUM_LEAVERS)))
            mistakes = asyncio.gather(*(refused(client, number % 4) for number in range(24)))
            return await streams, await leaving, await mistakes

    begin = monotonic()
    ((answers, events, statuses),) = run(server, everybody())
    after = assert_nothing_is_left(server, before)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    print(f"{monotonic() - begin:.1f} s, {grown['preemptions_total']:.0f} preemptions")
    assert answers == [expected[text] for text in texts]
    assert sum(events) > 0
    assert statuses == [404, 400, 400, 400] * 6
    # Three of four leavers have seen the status of their answer; a request of the others may never have arrived.
    assert NUM_LEAVERS * 3 // 4 <= grown["sequences_finished_total{abort}"] <= NUM_LEAVERS
    finished = grown["sequences_finished_total{length}"] + grown.get("sequences_finished_total{stop}", 0.0)
    assert finished == NUM_STREAMS


@pytest.mark.parametrize("streams", [True, False])
def test_a_request_whose_client_leaves_while_it_waits_is_dropped_before_it_runs(
    server: Server, client: openai.OpenAI, streams: bool
) -> None:
    before = metrics(server)

    async def work() -> None:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as http:
            body = {"model": MODEL, "prompt": "a" * 100, "ignore_eos": True, "stream": True, "max_tokens": 400}
            url = f"{root(server)}/v1/completions"
            async with http.stream("POST", url, json=body | {"n": 40}, timeout=SECONDS) as first:
                lines = first.aiter_lines()  # kept: a stream whose iterator is gone is closed
                await anext(lines)  # it runs, and some of its sequences wait
                waiting = http.stream("POST", url, json=body | {"stream": streams}, timeout=SECONDS)
                if streams:
                    async with waiting:
                        pass
                else:
                    with pytest.raises(asyncio.TimeoutError):
                        await asyncio.wait_for(waiting.__aenter__(), 1.0)
                for _ in range(1000):
                    now = (await http.get(f"{root(server)}/metrics", timeout=SECONDS)).text
                    if "_sequences_finished_total" in now and _aborted(now) > before_aborted:
                        break
                    await asyncio.sleep(0.02)
                assert _aborted(now) == before_aborted + 1

    before_aborted = before.get("sequences_finished_total{abort}", 0.0)
    run(server, work())


def _aborted(text: str) -> float:
    lines = [line for line in text.splitlines() if 'sequences_finished_total{reason="abort"}' in line]
    return float(lines[0].split()[-1]) if lines else 0.0


def test_more_sequences_than_may_wait_are_refused_and_the_others_go_on(server: Server, client: openai.OpenAI) -> None:
    capacity = server.engine.capacity
    per_request = 24

    async def work() -> list[int]:
        async with httpx.AsyncClient(timeout=SECONDS) as many:

            async def ask() -> int:
                answer = await many.post(
                    f"{server.url}/completions",
                    json={"model": MODEL, "prompt": "a", "n": per_request, "max_tokens": 2, "ignore_eos": True},
                )
                if answer.status_code == 503:
                    assert answer.json()["error"]["code"] == "overloaded"
                    assert answer.headers["retry-after"] == "1"
                return answer.status_code

            return await asyncio.gather(*(ask() for _ in range(30)))

    (statuses,) = run(server, work())
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= capacity // per_request
