"""Mistakes get the status and the error object of OpenAI's API, and cost the server nothing."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import openai
import pytest

from fastdeploy_dsa.server.app import MAX_BODY_BYTES
from fastdeploy_dsa.server.serving import Server
from tests.server.serving import MAX_MODEL_LEN, root

MODEL = "demo_model"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "a"}


def post(server: Server, path: str, body: bytes | dict[str, Any]) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(root(server) + path, content=content, timeout=30)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error object, which is always whole."""
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("invalid_request_error" if answer.status_code < 500 else "server_error")
    return error


MALFORMED = {
    "empty": b"",
    "cut off": b'{"model": "demo_model", "prompt"',
    "not JSON": b"\xff\xfe\x00",
    "half a character": b'{"model": "demo_model", "prompt": "\\ud83d"}',
    "nested without end": b'{"model": "demo_model", "prompt": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_a_body_that_is_not_json_is_a_bad_request(
    server: Server, client: openai.OpenAI, path: str, body: bytes
) -> None:
    answer = post(server, path, body)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_json"


# What is wrong -> the body, the parameter that is blamed, words of the message.
WRONG_COMPLETIONS: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no model": ({"model": None}, "model", "valid string"),
    "model of another type": ({"model": 1}, "model", "valid string, got 1"),
    "temperature as text": ({"temperature": "hot"}, "temperature", "got 'hot'"),
    "negative temperature": ({"temperature": -1}, "temperature", "[0, inf)"),
    "temperature not a number": ({"temperature": float("nan")}, "temperature", "[0, inf)"),
    "top_p of 0": ({"top_p": 0}, "top_p", "(0, 1]"),
    "no token": ({"max_tokens": 0}, "max_tokens", "1 or more"),
    "max_tokens as bool": ({"max_tokens": True}, "max_tokens", "valid integer"),
    "no choice": ({"n": 0}, "n", "greater than or equal to 1"),
    "too many choices": ({"n": 129}, "n", "less than or equal to 128"),
    "more sequences than there is room for": ({"n": 128, "prompt": ["a"] * 8}, "n", "got 1024"),
    "seed out of range": ({"seed": 2**64}, "seed", "got 18446744073709551616"),
    "too many stop strings": ({"stop": ["a"] * 5}, "stop", "stop: expected at most 4 strings, got 5"),
    "too long a stop string": (
        {"stop": ["a", "b" * 257]},
        "stop",
        "stop: expected strings of at most 256 characters, got one of 257",
    ),
    "too long a single stop string": ({"stop": "b" * 257}, "stop", "at most 256 characters, got one of 257"),
    "stop of another type": ({"stop": 5}, "stop", "stop: expected a string or a list of strings"),
    "stop strings of another type": ({"stop": ["a", 5]}, "stop", "none of them empty, got ['a', 5]"),
    "too many stop tokens": ({"stop_token_ids": list(range(257))}, "stop_token_ids", "at most 256 items"),
    "token ids as text": ({"return_token_ids": "yes"}, "return_token_ids", "valid boolean"),
    "empty stop string": ({"stop": [""]}, "stop", "none of them empty"),
    "stop token out of range": ({"stop_token_ids": [264]}, "stop_token_ids", "0 to 263"),
    "too many logprobs": ({"logprobs": 21}, "logprobs", "20"),
    "empty prompt": ({"prompt": ""}, "prompt", "empty prompt"),
    "no prompts": ({"prompt": []}, "prompt", "list of texts"),
    "prompt of another type": ({"prompt": {"text": "a"}}, "prompt", "list of texts"),
    "mixed prompt": ({"prompt": ["a", 1]}, "prompt", "list of texts"),
    "token out of range": ({"prompt": [1, 264]}, "prompt", "0 to 263, got 264"),
    "token as text": ({"prompt": [[1], ["a"]]}, "prompt", "prompts[1]"),
    "best_of": ({"best_of": 3}, "best_of", "not supported"),
    "echo with logprobs": ({"echo": True, "logprobs": 1}, "logprobs", "echo"),
    "stream options without stream": ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    "logit_bias": ({"logit_bias": {"1": 2}}, "logit_bias", "not supported"),
    "frequency_penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    "presence_penalty": ({"presence_penalty": -1}, "presence_penalty", "not supported"),
    "suffix": ({"suffix": "end"}, "suffix", "not supported"),
    "unknown": ({"tempreature": 1}, "tempreature", "unknown"),
}
WRONG_CHATS: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no messages": ({"messages": []}, "messages", "at least 1"),
    "message of another type": ({"messages": ["a"]}, "messages.0", "object"),
    "unknown role": ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role", "'system'"),
    "role the template does not know": ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "'tool'"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content",
        "'text' only",
    ),
    "tool calls": ({"messages": [USER | {"tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    "JSON answers": ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    "logprobs as number": ({"logprobs": 2}, "logprobs", "boolean"),
}


@pytest.mark.parametrize(("change", "param", "words"), WRONG_COMPLETIONS.values(), ids=WRONG_COMPLETIONS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_parameter_is_named(
    server: Server, client: openai.OpenAI, change: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    answer = post(server, COMPLETIONS, {"model": MODEL, "prompt": "a", "stream": stream} | change)
    if "stream_options" in change and stream:
        assert answer.status_code == 200
        return
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(("change", "param", "words"), WRONG_CHATS.values(), ids=WRONG_CHATS)
def test_a_wrong_parameter_of_a_chat_is_named(
    server: Server, client: openai.OpenAI, change: dict[str, Any], param: str, words: str
) -> None:
    answer = post(server, CHAT, {"model": MODEL, "messages": [USER]} | change)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param
    assert words in error["message"]


def test_what_is_missing_is_named(server: Server, client: openai.OpenAI) -> None:
    for path, missing in ((COMPLETIONS, "prompt"), (CHAT, "messages")):
        answer = post(server, path, {"model": MODEL})
        assert (answer.status_code, error_of(answer)["param"]) == (400, missing)
        answer = post(server, path, b"[]")
        assert (answer.status_code, error_of(answer)["param"]) == (400, None)


def test_a_wrong_model_name_is_not_found(client: openai.OpenAI) -> None:
    calls = [
        lambda: client.completions.create(model="gpt-4", prompt="a"),
        lambda: client.completions.create(model="gpt-4", prompt="a", stream=True),
        lambda: client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "a"}]),
        lambda: client.models.retrieve("gpt-4"),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found"
        assert "'gpt-4'" in str(caught.value)
        assert "'demo_model'" in str(caught.value)


def test_a_prompt_that_is_too_long_is_refused_with_the_limit(client: openai.OpenAI) -> None:
    calls = [
        lambda: client.completions.create(model=MODEL, prompt="a" * (MAX_MODEL_LEN - 1)),  # and <bos>
        lambda: client.completions.create(model=MODEL, prompt=["a", [1] * MAX_MODEL_LEN], stream=True),
        lambda: client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a" * 5000}]),
    ]
    for call in calls:
        with pytest.raises(
            openai.BadRequestError, match=f"{MAX_MODEL_LEN - 1} tokens, one less than max_model_len"
        ) as caught:
            call()
        assert caught.value.code == "context_length_exceeded"
    assert client.completions.create(model=MODEL, prompt="a" * (MAX_MODEL_LEN - 2)).usage.completion_tokens == 1  # type: ignore[union-attr]


def test_a_body_that_is_too_large_is_refused(server: Server, client: openai.OpenAI) -> None:
    answer = post(server, COMPLETIONS, b"[" + b" " * MAX_BODY_BYTES)
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"


def test_unknown_paths_and_methods(server: Server, client: openai.OpenAI) -> None:
    for method, path, status in (("GET", "/v1/embeddings", 404), ("GET", COMPLETIONS, 405), ("POST", "/health", 405)):
        answer = httpx.request(method, root(server) + path)
        assert answer.status_code == status
        assert path in error_of(answer)["message"]


def test_a_client_that_leaves_within_its_body_is_forgotten(server: Server, client: openai.OpenAI) -> None:
    host, port = root(server).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert httpx.get(f"{root(server)}/health").status_code == 200
