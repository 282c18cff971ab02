"""LLM: what comes out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.engine.sampler import NonFiniteLogitsError
from tests.kit.byte_tokenizer import BOS_ID, byte_tokenizer, save_byte_tokenizer
from tests.kit.tiny_model import MAX_POSITIONS, VOCAB_SIZE, write_tiny_model

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = "What is a sparse attention?"


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model, num_threads=1, block_size=16, num_blocks=20)


@pytest.fixture(scope="module")
def first_output(llm: LLM) -> list[int]:
    """What the LLM generates before any test has used it."""
    return llm.generate([[1, 2, 3]], GREEDY)[0].token_ids


@pytest.fixture(autouse=True)
def _llm_still_works(llm: LLM, first_output: list[int]) -> Iterator[None]:
    """Whatever a test does, the next request gets the same tokens and nobody owns a block any more."""
    yield
    assert llm.generate([[1, 2, 3]], GREEDY)[0].token_ids == first_output
    llm._core.scheduler.check_integrity()
    assert llm._core.scheduler.num_running == llm._core.scheduler.num_waiting == 0
    assert llm.cache_stats().cache.device.num_owned == 0


def test_text_and_its_token_ids_give_the_same(llm: LLM) -> None:
    ids = [BOS_ID, *PROMPT.encode()]
    text, tokens, array = llm.generate([PROMPT, ids, np.array(ids)], GREEDY)
    assert (text.prompt, tokens.prompt) == (PROMPT, None)
    assert text.prompt_token_ids == tokens.prompt_token_ids == ids
    assert text.token_ids == tokens.token_ids == array.token_ids
    assert text.text == tokens.text
    assert len({output.request_id for output in (text, tokens, array)}) == 3


def test_one_text_is_one_prompt_and_no_prompt_is_no_output(llm: LLM) -> None:
    assert len(llm.generate(PROMPT, GREEDY)) == 1
    assert llm.generate([], GREEDY) == []


def test_the_text_is_that_of_the_tokens(llm: LLM) -> None:
    output = llm.generate(PROMPT, GREEDY)[0]
    assert byte_tokenizer().decode(output.token_ids).startswith(output.text)


def test_a_stream_adds_up_to_what_generate_returns(llm: LLM) -> None:
    params = [GREEDY, SamplingParams(max_tokens=7, seed=3, logprobs=2, ignore_eos=True)]
    outputs = llm.generate([PROMPT, [5, 6]], params)
    deltas = list(llm.stream([PROMPT, [5, 6]], params))
    for index, output in enumerate(outputs):
        mine = [delta for delta in deltas if delta.index == index]
        assert list(chain.from_iterable(delta.token_ids for delta in mine)) == output.token_ids
        assert "".join(delta.text for delta in mine) == output.text
        assert [delta.finish_reason for delta in mine] == [None] * (len(mine) - 1) + [output.finish_reason]
    assert (
        list(chain.from_iterable(delta.logprobs or () for delta in deltas if delta.index == 1)) == outputs[1].logprobs
    )


def test_streams_can_be_open_side_by_side(llm: LLM) -> None:
    expected = llm.generate(PROMPT, GREEDY)[0].token_ids
    streams = [llm.stream(PROMPT, GREEDY) for _ in range(3)]
    received: list[list[int]] = [[], [], []]
    for _ in range(len(expected) + 1):
        for stream, tokens in zip(streams, received, strict=True):
            delta = next(stream, None)
            tokens.extend([] if delta is None else delta.token_ids)
    assert received == [expected] * 3


def test_a_stream_that_is_closed_or_never_read_leaves_nothing_behind(llm: LLM) -> None:
    unread = llm.stream(PROMPT, GREEDY)
    stream = llm.stream([PROMPT, PROMPT], GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    del unread


def test_max_tokens_is_cut_at_the_length_of_the_model(llm: LLM) -> None:
    prompt = [7] * (MAX_POSITIONS - 3)
    for max_tokens in (1000, None):
        output = llm.generate([prompt], SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))[0]
        assert (len(output.token_ids), output.finish_reason) == (3, "length")


def test_without_max_tokens_a_request_goes_as_far_as_the_cache(tiny_model: Path) -> None:
    small = LLM(tiny_model, num_threads=1, block_size=16, num_blocks=2)
    output = small.generate([[1] * 20], SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True))[0]
    assert len(output.token_ids) == 32 - 20 + 1


def test_end_tokens_and_stop_tokens_end_a_request(llm: LLM) -> None:
    tokens = llm.generate(PROMPT, GREEDY)[0].token_ids
    stop = tokens[4]
    output = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=[stop]))[0]
    place = tokens.index(stop)
    assert output.token_ids == tokens[: place + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == byte_tokenizer().decode(tokens[:place]).rstrip("\N{REPLACEMENT CHARACTER}")


def test_the_models_own_end_token_ends_a_request_unless_ignored(tiny_model: Path) -> None:
    tokens = LLM(tiny_model, num_threads=1, num_blocks=4).generate(PROMPT, GREEDY)[0].token_ids
    ending = LLM(tiny_model, num_threads=1, num_blocks=4, hf_overrides={"eos_token_id": tokens[3]})
    output = ending.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0.0))[0]
    assert output.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert ending.generate(PROMPT, GREEDY)[0].token_ids == tokens


def test_a_stop_string_ends_a_request(llm: LLM) -> None:
    text = llm.generate(PROMPT, GREEDY)[0].text
    printable = next(character for character in text if character.isascii())
    output = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop=printable))[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", printable)
    assert output.text == text[: text.index(printable)]


def test_logprobs_come_one_per_token(llm: LLM) -> None:
    output = llm.generate(PROMPT, SamplingParams(max_tokens=5, temperature=0.0, logprobs=3, ignore_eos=True))[0]
    assert output.logprobs is not None
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(entries)) == token, "greedy takes the most likely one"
        assert len(entries) == 3


def test_requests_without_a_seed_differ_and_the_engines_seed_repeats_them(tiny_model: Path) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    runs = []
    for seed in (1, 1, 2):
        llm = LLM(tiny_model, num_threads=1, num_blocks=8, seed=seed)
        runs.append([output.token_ids for output in llm.generate([PROMPT] * 2 + [[3]], params)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0] != runs[0][1], "two requests with equal prompts"


def test_the_time_split_covers_the_steps(llm: LLM) -> None:
    before = llm.time_split()
    llm.generate(PROMPT, GREEDY)
    after = llm.time_split()
    assert after.num_steps - before.num_steps == GREEDY.max_tokens
    assert after.model > before.model
    assert after.engine > before.engine


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([""], "prompts[0]: expected text or token ids, got an empty prompt"),
        (["a", []], "prompts[1]: expected at least one token id, got an empty sequence"),
        (
            [1, 2],
            "prompts[0]: expected text or a sequence of token ids, got 1; "
            "token ids of one prompt go into a list of their own",
        ),
        (5, "prompts: expected a string or a sequence of prompts, got int"),
        ([None], "prompts[0]: expected text or a sequence of token ids, got None"),
        ([b"bytes"], "prompts[0]: expected text or a sequence of token ids, got b'bytes'"),
        ([[1, VOCAB_SIZE]], f"prompts[0][1]: expected a token id of 0 to {VOCAB_SIZE - 1}, got {VOCAB_SIZE}"),
        ([[-1]], f"prompts[0][0]: expected a token id of 0 to {VOCAB_SIZE - 1}, got -1"),
        ([[True]], f"prompts[0][0]: expected a token id of 0 to {VOCAB_SIZE - 1}, got True"),
        ([[1.0]], f"prompts[0][0]: expected a token id of 0 to {VOCAB_SIZE - 1}, got 1.0"),
        (["a\ud800"], "prompts[0]: expected Unicode text, got '\\ud800' at 1"),
        (
            ["ok", [1] * MAX_POSITIONS],
            f"prompts[1]: expected at most {MAX_POSITIONS - 1} tokens, one less than max_model_len, "
            f"got {MAX_POSITIONS}",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_bad_prompt_is_named(llm: LLM, prompts: Any, message: str) -> None:
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=r".") as caught:
            call(prompts, GREEDY)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([GREEDY], "sampling_params: expected one per prompt (2), got 1"),
        ({"seed": 0}, "sampling_params: expected SamplingParams, one or one per prompt, got {'seed': 0}"),
        (
            SamplingParams(logprobs=VOCAB_SIZE + 1),
            f"logprobs: expected an int of 0 to {VOCAB_SIZE}, got {VOCAB_SIZE + 1}",
        ),
        (
            SamplingParams(stop_token_ids=[VOCAB_SIZE]),
            f"stop_token_ids: expected a token id of 0 to {VOCAB_SIZE - 1}, got {VOCAB_SIZE}",
        ),
    ],
)
def test_bad_parameters_are_named(llm: LLM, params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        llm.generate(["a", "b"], params)
    assert str(caught.value) == message


def test_a_request_larger_than_the_cache_is_refused_before_anything_runs(tiny_model: Path) -> None:
    small = LLM(tiny_model, num_threads=1, block_size=16, num_blocks=2)
    with pytest.raises(ValueError, match=r"prompts\[1\]: .* the cache of 2 blocks, got 30 \+ 12 tokens .* need 3"):
        small.generate([[1], [1] * 30], GREEDY)
    assert small.time_split().num_steps == 0
    assert len(small.generate([[1] * 21], GREEDY)[0].token_ids) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dtype": "int4"}, "cache_dtype: expected one of auto, fp8, bfloat16, float32, got 'int4'"),
        ({"max_model_len": MAX_POSITIONS + 1}, f"max_model_len: expected an int of 2 to {MAX_POSITIONS}, got 257"),
        ({"block_size": 0}, "block_size: expected an int of 1 or more, got 0"),
        ({"num_blocks": 0}, "num_blocks: expected an int of 1 or more, got 0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens: expected an int of 1 or more, got 0"),
        ({"max_num_seqs": 0}, "max_num_seqs: expected an int of 1 or more, got 0"),
        ({"num_threads": -1}, "num_threads: expected an int of 0 or more, got -1"),
        ({"seed": -1}, f"seed: expected an int of 0 to {2**64 - 1}, got -1"),
        ({"cache_memory": "1 potato"}, "cache_memory: expected bytes, such as 1048576 or '512MiB', got '1 potato'"),
        ({"cache_memory": 0}, "cache_memory: expected an int of 1 or more, got 0"),
        ({"swap_space": -1}, "swap_space: expected an int of 0 or more, got -1"),
        ({"swap_space": None}, "swap_space: expected an int of 0 or more, got None"),
        (
            {"swap_space": 7, "block_size": 16},
            "swap_space: expected 0 or room for a block of 16 tokens (31744 bytes), got 7",
        ),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching: expected True or False, got 1"),
        ({"check_integrity": "yes"}, "check_integrity: expected True or False, got 'yes'"),
        (
            {"max_num_batched_tokens": 4, "max_num_seqs": 8},
            "max_num_batched_tokens: expected max_num_seqs (8) or more, got 4",
        ),
    ],
    ids=str,
)
def test_a_bad_option_is_named(tiny_model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        LLM(tiny_model, **options)
    assert str(caught.value) == message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: expected a folder with config.json .*nowhere"):
        LLM(tmp_path / "nowhere")


def test_the_cache_is_as_large_as_needed_but_no_larger_than_its_memory(tiny_model: Path) -> None:
    def blocks(**options: Any) -> int:
        return LLM(tiny_model, num_threads=1, block_size=16, **options)._cache.num_blocks

    # (128 + 16) float32 of the latent cache in three layers, 32 of the index cache in two.
    bytes_per_block = 16 * 4 * (3 * 144 + 2 * 32)
    assert blocks(max_num_seqs=3, max_model_len=40) == 3 * 3
    assert blocks(max_num_seqs=3, max_model_len=40, cache_memory=5 * bytes_per_block + 1) == 5
    with pytest.raises(ValueError, match=rf"cache_memory: .* 16 tokens \({bytes_per_block} bytes\), got 1024"):
        blocks(cache_memory="1KiB")


def test_a_model_without_a_tokenizer_takes_token_ids_only(tmp_path: Path) -> None:
    llm = LLM(write_tiny_model(tmp_path / "bare"), num_threads=1, num_blocks=4)
    output = llm.generate([[1, 2]], GREEDY)[0]
    assert (len(output.token_ids), output.text) == (12, "")
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected token ids, got text, and .* has no tokenizer.json"):
        llm.generate("text", GREEDY)
    with pytest.raises(ValueError, match=r"stop: expected no strings for a model without a tokenizer"):
        llm.generate([[1]], SamplingParams(stop="x"))


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer.json: expected a tokenizer, got a file that cannot be read"):
        LLM(folder)


@pytest.mark.parametrize("bos", ["<bos>", {"content": "<bos>"}])
def test_the_tokenizer_config_can_ask_for_bos(tmp_path: Path, bos: object) -> None:
    folder = write_tiny_model(tmp_path / "bos")
    save_byte_tokenizer(folder, adds_bos=False)
    content = {"add_bos_token": True, "bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    assert LLM(folder, num_threads=1, num_blocks=4).generate("a", GREEDY)[0].prompt_token_ids == [BOS_ID, ord("a")]


def test_weights_that_give_nan_end_in_an_error_and_not_in_text(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = np.full_like(weights["lm_head.weight"], 3e38)  # finite, but their sums are not
    save_file(weights, folder / "model.safetensors")
    llm = LLM(folder, num_threads=1, num_blocks=4)
    with pytest.raises(NonFiniteLogitsError, match="the largest of the model's logits is"):
        llm.generate([[1, 2, 3], [4]], GREEDY)
    llm._core.scheduler.check_integrity()
    assert llm._core.scheduler.num_running == 0
