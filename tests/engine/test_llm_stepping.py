"""LLM for a caller with a loop of its own: read, add, step, abort."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.engine.prompts import Prompt, PromptTooLongError
from tests.kit.byte_tokenizer import BOS_ID, save_byte_tokenizer
from tests.kit.tiny_model import MAX_POSITIONS, write_tiny_model

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PROMPTS = ["one prompt", "another, longer prompt", [1, 2, 3]]


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    folder = write_tiny_model(tmp_path / "tiny")
    save_byte_tokenizer(folder)
    return LLM(folder, num_threads=1, block_size=8, num_blocks=40, max_num_seqs=2, check_integrity=True)


def test_stepping_gives_what_generate_gives(llm: LLM) -> None:
    expected = llm.generate(PROMPTS, GREEDY)
    requests = llm.add(PROMPTS, GREEDY)
    assert (llm.num_running, llm.num_waiting) == (0, 3)
    deltas = []
    while llm.num_running + llm.num_waiting:
        llm.step()
        deltas += [delta for request in requests if (delta := request.take_delta()) is not None]
    assert llm.step() == 0
    for index, output in enumerate(expected):
        own = [delta for delta in deltas if delta.index == index]
        assert [token for delta in own for token in delta.token_ids] == output.token_ids
        assert "".join(delta.text for delta in own) == output.text
        assert own[-1].finish_reason == output.finish_reason == "length"


def test_aborted_requests_leave_nothing_and_the_others_go_on(llm: LLM) -> None:
    requests = llm.add(PROMPTS, GREEDY)
    llm.step()
    assert (llm.num_running, llm.num_waiting) == (2, 1)
    llm.abort([requests[0], requests[2]])
    llm.abort(requests[:1])
    assert (llm.num_running, llm.num_waiting) == (1, 0)
    while llm.num_running:
        llm.step()
    assert [request.finish_reason for request in requests] == ["abort", "length", "abort"]
    assert llm.cache_stats().cache.device.num_owned == 0


def test_a_prompt_that_was_read_is_taken_as_it_is(llm: LLM) -> None:
    read = llm.read(PROMPTS)
    assert [prompt.text for prompt in read] == [*PROMPTS[:2], None]
    texts = [output.text for output in llm.generate(PROMPTS, GREEDY)]
    assert [output.text for output in llm.generate(read, GREEDY)] == texts
    assert llm.generate([read[0]], GREEDY)[0].prompt == PROMPTS[0]


def test_special_tokens_are_added_unless_the_text_has_them(llm: LLM) -> None:
    (with_bos,), (without,), (own,) = (
        llm.read("ab"),
        llm.read("ab", add_special_tokens=False),
        llm.read("<bos>ab", add_special_tokens=False),
    )
    assert with_bos.token_ids.tolist() == own.token_ids.tolist() == [BOS_ID, *b"ab"]
    assert without.token_ids.tolist() == list(b"ab")


def test_a_prompt_that_is_too_long_has_an_error_of_its_own(llm: LLM) -> None:
    assert llm.max_model_len == MAX_POSITIONS
    with pytest.raises(PromptTooLongError, match=r"prompts\[1\]: expected at most 255 tokens"):
        llm.read(["a", "b" * MAX_POSITIONS])


def test_tokens_that_the_cache_had_are_told(llm: LLM) -> None:
    prompt = Prompt(None, np.arange(20))
    outputs = [llm.generate([prompt], GREEDY)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 16]  # whole blocks
    (request,) = llm.add([prompt], GREEDY)
    llm.step()
    delta = request.take_delta()
    assert delta is not None
    assert delta.num_cached_tokens == 16
    llm.abort([request])
