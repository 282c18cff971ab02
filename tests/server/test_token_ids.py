"""Answers with token ids: when asked for, and always where there is no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openai

from fastdeploy_dsa import LLM, SamplingParams
from tests.kit.tiny_model import write_tiny_model
from tests.server.serving import running, sync_client

ASKED = {"return_token_ids": True}
QUESTION = "What is a cache?"
PROMPT = f"Q: {QUESTION}\nA:"
FIXED: dict[str, Any] = {"model": "demo_model", "temperature": 0, "max_tokens": 12}
NAMES = ("prompt_token_ids", "completion_token_ids")


def ids_of(found: Any, name: str) -> list[int] | None:
    return (found.model_extra or {}).get(name)


def all_ids(parts: Iterable[Any]) -> list[int]:
    """The generated tokens of the parts of a stream."""
    return [token for part in parts for token in ids_of(part, NAMES[1]) or []]


def test_a_completion_has_the_ids_of_each_choices_prompt_and_of_its_tokens(client: openai.OpenAI, llm: LLM) -> None:
    prompts = [PROMPT, "abc"]
    expected = llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0))
    for stream in (False, True):
        for prompt in (prompts, [output.prompt_token_ids for output in expected]):
            answer: Any = client.completions.create(prompt=prompt, n=2, stream=stream, extra_body=ASKED, **FIXED)
            choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
            for index in range(4):
                mine = [choice for choice in choices if choice.index == index]
                output = expected[index // 2]
                given = [ids for choice in mine if (ids := ids_of(choice, NAMES[0])) is not None]
                assert given == [output.prompt_token_ids]
                assert all_ids(mine) == output.token_ids
                assert "".join(choice.text for choice in mine) == output.text


def test_a_chat_has_them_in_its_message_or_deltas(client: openai.OpenAI, llm: LLM) -> None:
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0))
    fixed: dict[str, Any] = FIXED | {"messages": [{"role": "user", "content": QUESTION}], "extra_body": ASKED}
    message = client.chat.completions.create(**fixed).choices[0].message
    assert [ids_of(message, name) for name in NAMES] == [expected.prompt_token_ids, expected.token_ids]
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **fixed)]
    assert [ids_of(delta, NAMES[0]) for delta in deltas] == [expected.prompt_token_ids] + [None] * (len(deltas) - 1)
    assert all_ids(deltas) == expected.token_ids


def test_tokens_without_text_and_those_that_a_stop_string_cut_off_are_told(client: openai.OpenAI, llm: LLM) -> None:
    (whole,) = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0))
    stop = whole.text[4:8]
    stream: Any = client.completions.create(prompt=PROMPT, stop=stop, stream=True, extra_body=ASKED, **FIXED)
    choices = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.text for choice in choices) == whole.text.partition(stop)[0]
    assert [ids_of(choice, NAMES[1]) for choice in choices] == [None, *([token] for token in whole.token_ids[:8])]


def test_they_are_not_there_unless_asked_for(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="abc", **FIXED).choices[0]
    chunk = next(iter(client.completions.create(prompt="abc", stream=True, **FIXED))).choices[0]
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "a"}], **FIXED).choices[0].message
    for found in (whole, chunk, chat):
        assert not set(NAMES) & set(found.model_dump())


def test_echo_comes_with_the_prompts_ids(client: openai.OpenAI) -> None:
    stream: Any = client.completions.create(prompt="abc", echo=True, stream=True, extra_body=ASKED, **FIXED)
    first = next(iter(stream)).choices[0]
    stream.close()
    assert (first.text, len(ids_of(first, NAMES[0]) or [])) == ("abc", 4)


def test_without_a_tokenizer_they_are_always_there(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    (expected,) = LLM(folder, num_threads=1).generate([[5, 6, 7]], greedy)
    fixed: dict[str, Any] = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0}
    with running(folder, num_threads=1) as server, sync_client(server) as client:
        choice = client.completions.create(**fixed).choices[0]
        assert (choice.text, ids_of(choice, NAMES[0]), ids_of(choice, NAMES[1])) == ("", [5, 6, 7], expected.token_ids)
        choices = [chunk.choices[0] for chunk in client.completions.create(stream=True, **fixed)]
        assert ids_of(choices[0], NAMES[0]) == [5, 6, 7]
        assert all_ids(choices) == expected.token_ids
