"""What OpenAI's own client gets is what the LLM generates."""

from __future__ import annotations

import itertools

import httpx
import openai
import pytest

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.installation import DEMO_MODEL
from fastdeploy_dsa.server.serving import Server
from tests.server.serving import MAX_MODEL_LEN, metrics, root, running, sync_client

MODEL = "demo_model"
FACT = "The code of the red box is 4812."
PROMPTS = [f"{FACT} What is the code of the red box?", "Q: What is a cache?\nA:", "Ä€😀 and so on"]
GREEDY = SamplingParams(max_tokens=40, temperature=0.0)


def streamed_text(client: openai.OpenAI, prompt: str | list[int], max_tokens: int = 40) -> str:
    stream = client.completions.create(model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True)
    return "".join(chunk.choices[0].text for chunk in stream)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_whole_and_generated_texts_are_equal(client: openai.OpenAI, llm: LLM, prompt: str) -> None:
    (expected,) = llm.generate(prompt, GREEDY)
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=40, temperature=0)
    assert whole.choices[0].text == expected.text == streamed_text(client, prompt)
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert whole.usage.completion_tokens == len(expected.token_ids)
    assert streamed_text(client, expected.prompt_token_ids) == expected.text


def test_a_conversation_is_what_the_template_makes_of_it(client: openai.OpenAI, llm: LLM) -> None:
    prompt = f"{FACT}\nQ: What is a cache?\nA: A store.\nQ: What is the code of the red box?\nA:"
    (expected,) = llm.generate(prompt, GREEDY)
    assert expected.text == " 4812"
    messages = [
        {"role": "system", "content": FACT},
        {"role": "user", "content": "What is a cache?"},
        {"role": "assistant", "content": "A store."},
        {"role": "user", "content": [{"type": "text", "text": "What is the code of the red box?"}]},
    ]
    whole = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)  # type: ignore[arg-type]
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(expected.prompt_token_ids)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        temperature=0,
        stream=True,  # type: ignore[arg-type]
    )
    choices = [chunk.choices[0] for chunk in stream]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == expected.text
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


def test_the_last_chunk_holds_the_usage_if_asked_for(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="abc", max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (4, 5)
    assert chunks[-1].usage.total_tokens == 9


def test_the_wire_is_that_of_server_sent_events(server: Server, client: openai.OpenAI) -> None:
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{root(server)}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith('data: {"id": "cmpl-') for event in events[:-2])


def test_cached_prompt_tokens_are_told(client: openai.OpenAI) -> None:
    prompt = "Told to nobody before: " + "xyz" * 60
    found = []
    for _ in range(2):
        usage = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        found.append(usage.prompt_tokens_details.cached_tokens)
    assert found == [0, 192]  # three whole blocks of 64


def test_several_prompts_and_choices_are_in_order_and_a_choice_does_not_depend_on_the_others(
    client: openai.OpenAI,
) -> None:
    sampled = {"model": MODEL, "max_tokens": 8, "seed": 7, "temperature": 1.0}
    both = client.completions.create(prompt=["one", "two"], n=2, **sampled)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(prompt=prompt, n=2, **sampled) for prompt in ("one", "two")]
    texts = [choice.text for choice in itertools.chain(alone[0].choices, alone[1].choices)]
    assert [choice.text for choice in both.choices] == texts
    assert texts[0] != texts[1]
    assert client.completions.create(prompt="one", **sampled).choices[0].text == texts[0]
    assert both.usage is not None
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (8, 32)
    stream = client.completions.create(prompt=["one", "two"], n=2, stream=True, **sampled)
    streamed = [""] * 4
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_a_negative_seed_is_a_seed(client: openai.OpenAI) -> None:
    texts = [
        client.completions.create(model=MODEL, prompt="one", seed=seed, max_tokens=12).choices[0].text
        for seed in (-1, -1, -2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_text_ends_before_a_stop_string_streamed_or_not(client: openai.OpenAI, llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], GREEDY)
    stop = whole.text[10:14]
    for stream in (False, True):
        answer = client.completions.create(
            model=MODEL, prompt=PROMPTS[0], max_tokens=40, temperature=0, stop=[stop], stream=stream
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices  # type: ignore[union-attr]
        assert "".join(choice.text for choice in choices) == whole.text.partition(stop)[0]
        assert choices[-1].finish_reason == "stop"


def test_echo_puts_the_prompt_in_front(client: openai.OpenAI, llm: LLM) -> None:
    (expected,) = llm.generate("abc", SamplingParams(max_tokens=4, temperature=0))
    fixed = {"model": MODEL, "max_tokens": 4, "temperature": 0, "echo": True}
    for prompt in ("abc", expected.prompt_token_ids):
        answer = client.completions.create(prompt=prompt, **fixed)
        assert answer.choices[0].text == "abc" + expected.text
        stream = client.completions.create(prompt=prompt, stream=True, **fixed)
        assert "".join(chunk.choices[0].text for chunk in stream) == "abc" + expected.text


def test_logprobs_are_those_of_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    prompt = "Q: What is a cache?\nA:"
    (expected,) = llm.generate(prompt, SamplingParams(max_tokens=6, temperature=0, logprobs=2))
    assert expected.logprobs is not None
    chosen = [entry[token].logprob for token, entry in zip(expected.token_ids, expected.logprobs, strict=True)]
    texts = [chr(token) for token in expected.token_ids]  # the ids of this model are bytes
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0, logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs == chosen
    assert found.tokens == texts
    assert found.text_offset == list(range(6))
    assert found.top_logprobs is not None
    assert [len(entry) for entry in found.top_logprobs] == [2] * 6
    fixed = {"model": MODEL, "max_tokens": 6, "temperature": 0, "logprobs": True}
    messages = [{"role": "user", "content": "What is a cache?"}]
    for num_top in (0, 3):
        chat = client.chat.completions.create(messages=messages, top_logprobs=num_top, **fixed)  # type: ignore[call-overload]
        content = chat.choices[0].logprobs.content
        assert [token.logprob for token in content] == chosen
        assert [bytes(token.bytes) for token in content] == [text.encode() for text in texts]
        assert [len(token.top_logprobs) for token in content] == [num_top] * 6
    stream = client.chat.completions.create(messages=messages, stream=True, **fixed)  # type: ignore[call-overload]
    parts = [chunk.choices[0].logprobs for chunk in stream]
    assert [token.logprob for part in parts if part is not None for token in part.content] == chosen


def test_drafts_change_no_text_and_come_in_fewer_chunks(llm: LLM) -> None:
    drafting = {"method": "mtp", "num_speculative_tokens": 3}
    (expected,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=40, temperature=0, logprobs=0))
    with (
        running(DEMO_MODEL, num_threads=1, max_model_len=256, num_blocks=4, speculative_config=drafting) as server,
        sync_client(server) as client,
    ):
        fixed = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0, "logprobs": 0}
        assert client.completions.create(**fixed).choices[0].text == expected.text
        choices = [chunk.choices[0] for chunk in client.completions.create(stream=True, **fixed)]
        assert "".join(choice.text for choice in choices) == expected.text
        assert sum(len(choice.logprobs.tokens) for choice in choices) == len(expected.token_ids)
        assert len(choices) < len(expected.token_ids) / 2


def test_parameters_beyond_openais_reach_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    extra = {"ignore_eos": True, "top_k": 1, "min_p": 0.1, "stop_token_ids": [5], "skip_special_tokens": False}
    params = SamplingParams(max_tokens=50, temperature=1.0, **extra)  # type: ignore[arg-type]
    (expected,) = llm.generate(PROMPTS[0], params)
    assert "<eos>" in expected.text
    answer = client.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=50, extra_body=extra)
    assert answer.choices[0].text == expected.text


def test_values_that_change_nothing_are_accepted(client: openai.OpenAI) -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "best_of": 1}
    answer = client.completions.create(model=MODEL, prompt="a", max_tokens=2, n=None, extra_body=neutral)
    assert answer.choices[0].finish_reason == "length"


def test_a_chat_answer_is_as_long_as_fits_unless_it_is_limited(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "x" * 490}]
    fixed = {"model": MODEL, "messages": messages, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(**fixed)
    assert answer.usage.total_tokens == MAX_MODEL_LEN
    assert client.chat.completions.create(max_completion_tokens=3, **fixed).usage.completion_tokens == 3


def test_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == (MODEL, "model", MAX_MODEL_LEN)  # type: ignore[attr-defined]
    assert client.models.retrieve(MODEL) == model


def test_health_and_metrics(server: Server, client: openai.OpenAI) -> None:
    assert httpx.get(f"{root(server)}/health").json() == {"status": "ok"}
    before = metrics(server)
    client.completions.create(model=MODEL, prompt="metrics", max_tokens=7)
    after = metrics(server)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["generated_tokens_total"] == grown["steps_total"] == 7
    assert grown["computed_tokens_total"] == 14
    assert grown["prefix_queried_tokens_total"] == 8
    assert after["sequences_finished_total{length}"] == before["sequences_finished_total{length}"] + 1
