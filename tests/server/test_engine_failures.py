"""What fails in the engine reaches exactly those it concerns; time and shutdown end requests, too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import openai
import pytest

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.engine.sampler import NonFiniteLogitsError
from fastdeploy_dsa.server import engine_thread, serving
from fastdeploy_dsa.server.engine_thread import EngineThread, Generation
from fastdeploy_dsa.server.errors import ApiError
from fastdeploy_dsa.server.serving import Server, ServerOptions
from tests.kit.byte_tokenizer import save_byte_tokenizer
from tests.kit.tiny_model import write_tiny_model
from tests.server.serving import assert_nothing_is_left, metrics, root, running, sync_client

LONG = {
    "model": "tiny",
    "prompt": "a long one",
    "max_tokens": 200,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}
SHORT = LONG | {"prompt": "a short one", "max_tokens": 5}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def server(tiny: Path) -> Iterator[Server]:
    """One sequence runs at a time, the others wait."""
    with running(tiny, num_threads=1, max_num_seqs=1) as found:
        yield found


class Faults:
    """Between the engine thread and its LLM: the next step does something else first."""

    def __init__(self, server: Server) -> None:
        self._llm = server.engine._llm
        self._step = self._llm.step
        self.before_step: Callable[[], None] | None = None
        self._llm.step = self._run  # type: ignore[method-assign]

    def raise_once(self, error: Exception) -> None:
        def fail() -> None:
            self.before_step = None
            raise error

        self.before_step = fail

    def _run(self) -> int:
        if self.before_step is not None:
            self.before_step()
        return self._step()


def begin_stream(client: openai.OpenAI) -> Any:
    stream = client.completions.create(stream=True, **LONG)
    next(iter(stream))
    return stream


def wait_until(server: Server, name: str, value: float) -> None:
    deadline = monotonic() + 10
    while metrics(server)[name] != value:
        assert monotonic() < deadline, f"{name} is not {value}"
        sleep(0.01)


def test_a_failed_step_ends_the_requests_that_ran_and_no_others(server: Server, tiny: Path) -> None:
    expected = LLM(tiny, num_threads=1).generate("a short one", SamplingParams(5, 0.0, ignore_eos=True))[0].text
    before = metrics(server)
    with sync_client(server) as client, ThreadPoolExecutor() as pool:
        stream = begin_stream(client)
        waiting = pool.submit(client.completions.create, **SHORT)
        wait_until(server, "requests_waiting", 1)
        Faults(server).raise_once(NonFiniteLogitsError("the largest of the model's logits is nan"))
        with pytest.raises(openai.APIError, match="the engine failed: the largest of the model's logits is nan"):
            list(stream)
        assert waiting.result(20).choices[0].text == expected
        assert httpx.get(f"{root(server)}/health").status_code == 200
    assert_nothing_is_left(server, before)


def test_a_failed_step_is_an_internal_error_of_an_answer_that_is_not_streamed(server: Server) -> None:
    before = metrics(server)
    Faults(server).raise_once(NonFiniteLogitsError("the largest of the model's logits is nan"))
    with sync_client(server) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**SHORT)
        assert (caught.value.status_code, caught.value.code) == (500, "engine_error")
        assert client.completions.create(**SHORT).choices[0].finish_reason == "length"
    assert_nothing_is_left(server, before)


def test_an_engine_that_cannot_go_on_tells_everybody_why(server: Server) -> None:
    with sync_client(server) as client, ThreadPoolExecutor() as pool:
        stream = begin_stream(client)
        waiting = pool.submit(client.completions.create, **SHORT)
        wait_until(server, "requests_waiting", 1)
        Faults(server).raise_once(RuntimeError("out of luck"))
        with pytest.raises(openai.APIError, match="RuntimeError: out of luck"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            waiting.result(20)
        assert caught.value.status_code == 500
        health = httpx.get(f"{root(server)}/health")
        assert health.status_code == 503
        assert health.json() == {"status": "unhealthy", "reason": "RuntimeError: out of luck"}
        for stream_too in (False, True):
            with pytest.raises(openai.InternalServerError, match="out of luck") as caught:
                client.completions.create(stream=stream_too, **SHORT)
            assert caught.value.status_code == 503
    assert server.engine.num_unfinished == 0


def test_an_engine_that_fails_while_it_takes_a_request_answers_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object) -> None:
        raise RuntimeError("no list of tokens")

    monkeypatch.setattr(server.engine._llm, "add", broken)
    with sync_client(server) as client, pytest.raises(openai.InternalServerError, match="no list of tokens") as caught:
        client.completions.create(**SHORT)
    assert caught.value.status_code == 500
    assert httpx.get(f"{root(server)}/health").status_code == 503


def test_statistics_that_fail_are_an_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no blocks to count")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine._llm, "cache_stats", broken)
        answer = httpx.get(f"{root(server)}/metrics", timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    assert "no blocks to count" in answer.json()["error"]["message"]
    assert httpx.get(f"{root(server)}/metrics", timeout=10).status_code == 200


def test_a_request_that_meets_the_end_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ends just before the request is handed to it."""
    engine = EngineThread(partial(LLM, tiny, num_threads=1), max_waiting=1)
    prompts = engine.start().read([[1, 2]])

    class Late(Generation):
        def __init__(self, num_sequences: int) -> None:
            super().__init__(num_sequences)
            engine.stop()

    monkeypatch.setattr(engine_thread, "Generation", Late)
    with pytest.raises(ApiError, match="the server is shutting down"):
        asyncio.run(asyncio.wait_for(engine.submit(prompts, [SamplingParams()]), timeout=10))
    assert engine.num_unfinished == 0


@pytest.mark.parametrize("waits", [False, True])
def test_a_request_that_takes_too_long_is_ended(tiny: Path, waits: bool) -> None:
    with running(tiny, options={"request_timeout": 0.4}, num_threads=1, max_num_seqs=1) as server:
        faults = Faults(server)
        faults.before_step = lambda: sleep(0.05)
        before = metrics(server)
        with sync_client(server) as client:
            stream = begin_stream(client)
            if waits:
                with pytest.raises(openai.InternalServerError, match=r"not finished within 0\.4 s") as caught:
                    client.completions.create(**SHORT)
                assert caught.value.status_code == 504
            with pytest.raises(openai.APIError, match=r"not finished within 0\.4 s"):
                list(stream)
            faults.before_step = None
            assert client.completions.create(**SHORT | {"max_tokens": 1}).choices[0].finish_reason == "length"
        assert_nothing_is_left(server, before)


def test_a_server_that_is_stopped_ends_what_still_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_SECONDS_TO_END", 1)
    with running(tiny, num_threads=1, max_num_seqs=1) as server:
        Faults(server).before_step = lambda: sleep(0.05)
        with sync_client(server) as client, ThreadPoolExecutor() as pool:
            stream = begin_stream(client)
            waiting = pool.submit(client.completions.create, **SHORT)
            wait_until(server, "requests_waiting", 1)
            begin = monotonic()
            server.stop()
            with pytest.raises(openai.APIError, match="the server is shutting down"):
                list(stream)
            with pytest.raises(openai.InternalServerError, match="the server is shutting down") as caught:
                waiting.result(20)
            assert caught.value.status_code == 503
            assert 1 <= monotonic() - begin < 20
    assert server.engine.num_unfinished == 0
    assert server.engine._llm.num_running == server.engine._llm.num_waiting == 0
    assert server.engine._llm.cache_stats().cache.device.num_owned == 0


def test_a_model_without_a_template_completes_but_does_not_chat(server: Server) -> None:
    with sync_client(server) as client:
        assert client.completions.create(**SHORT).choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match=r"'tiny' has no chat template; .* --chat-template") as caught:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
        assert caught.value.code == "no_chat_template"


def test_a_model_without_a_tokenizer_takes_token_ids(tmp_path: Path) -> None:
    with running(write_tiny_model(tmp_path / "tiny"), num_threads=1) as server, sync_client(server) as client:
        answer = client.completions.create(model="tiny", prompt=[1, 2], max_tokens=3, logprobs=1)
        assert answer.choices[0].text == ""
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
        with pytest.raises(openai.BadRequestError, match="expected token ids, got text"):
            client.completions.create(model="tiny", prompt="a")


def test_what_is_wrong_with_a_model_or_an_address_is_raised(tiny: Path, tmp_path: Path, server: Server) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        Server(tmp_path, ServerOptions(port=0))
    port = int(root(server).rpartition(":")[2])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        Server(tiny, ServerOptions(port=port))
    with pytest.raises(OSError, match=r"cannot listen on no\.such\.invalid:0: "):
        Server(tiny, ServerOptions(host="no.such.invalid", port=0))
    for wrong in ({"port": 65536}, {"max_waiting": -1}, {"request_timeout": 0.0}, {"served_model_name": ""}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ServerOptions(**wrong)  # type: ignore[arg-type]
