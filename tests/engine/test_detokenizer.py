"""Text from tokens: whole characters, stop strings, and the same text as decoding everything at once."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models

from fastdeploy_dsa.engine.detokenizer import Detokenizer
from tests.kit.byte_tokenizer import BOS_ID, EOS_ID, byte_tokenizer

TEXT = st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aä€😀\n ")), max_size=40)


class CountingTokenizer:
    """A library tokenizer; counts what it decodes."""

    def __init__(self, library: LibraryTokenizer) -> None:
        self._library = library
        self.num_decoded = 0

    def encode(self, text: str) -> list[int]:
        return list(self._library.encode(text).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        return str(self._library.decode(token_ids, skip_special_tokens=skip_special_tokens))


BYTES = CountingTokenizer(byte_tokenizer())


def deltas(detokenizer: Detokenizer, tokens: Sequence[int]) -> tuple[list[str], str | None]:
    """What a reader sees after every token; ends at a stop string."""
    seen, stop = [], None
    for place, token in enumerate(tokens):
        stop = detokenizer.push(token)
        is_finished = stop is not None or place == len(tokens) - 1
        seen.append(detokenizer.take(is_finished=is_finished))
        if stop is not None:
            break
    return seen, stop


@settings(max_examples=300, deadline=None)
@given(text=TEXT, prompt=TEXT)
def test_the_pieces_are_the_text_and_no_piece_has_half_a_character(text: str, prompt: str) -> None:
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    detokenizer = Detokenizer(BYTES, prompt_token_ids=[BOS_ID, *prompt.encode()])
    seen, _ = deltas(detokenizer, list(text.encode()))
    assert "".join(seen) == text == detokenizer.text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(seen)


def test_a_character_appears_with_its_last_byte() -> None:
    detokenizer = Detokenizer(BYTES, prompt_token_ids=[])
    assert deltas(detokenizer, list("a€😀".encode()))[0] == ["a", "", "", "€", "", "", "", "😀"]


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_character_that_never_ends_is_left_out(missing: int) -> None:
    detokenizer = Detokenizer(BYTES, prompt_token_ids=[])
    seen, _ = deltas(detokenizer, list("ab😀".encode())[:-missing])
    assert "".join(seen) == detokenizer.text == "ab"


def test_a_character_that_begins_in_the_prompt_is_completed() -> None:
    begin, end = list("x€".encode())[:2], list("x€".encode())[2:]
    assert deltas(Detokenizer(BYTES, prompt_token_ids=begin), end)[0] == ["", "€"]


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 255), max_size=120))
def test_invalid_bytes_become_what_decoding_everything_makes_of_them(tokens: list[int]) -> None:
    tokens = [*tokens, *b"end"]
    detokenizer = Detokenizer(BYTES, prompt_token_ids=[])
    seen, _ = deltas(detokenizer, tokens)
    assert "".join(seen) == BYTES.decode(tokens)


def test_the_work_per_token_does_not_grow_with_the_text() -> None:
    for byte in (b"a", b"\xff", b"\x80"):
        BYTES.num_decoded = 0
        deltas(Detokenizer(BYTES, prompt_token_ids=[BOS_ID] * 500), list(byte * 2000))
        assert BYTES.num_decoded < 2000 * 40  # everything at every token would be 2000 * 1000


def test_special_tokens_give_text_only_if_asked_for() -> None:
    tokens = [ord("a"), EOS_ID, ord("b")]
    assert deltas(Detokenizer(BYTES, prompt_token_ids=[]), tokens)[0] == ["a", "", "b"]
    verbose = Detokenizer(BYTES, prompt_token_ids=[], skip_special_tokens=False)
    assert "".join(deltas(verbose, tokens)[0]) == "a<eos>b"


def test_ids_that_the_tokenizer_does_not_know_give_no_text() -> None:
    assert deltas(Detokenizer(BYTES, prompt_token_ids=[]), [ord("a"), 263, ord("b")])[0] == ["a", "", "b"]


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    detokenizer = Detokenizer(BYTES, prompt_token_ids=[], stop=["END"])
    seen, stop = deltas(detokenizer, list(b"one END two"))
    assert (seen, stop, detokenizer.text) == (["o", "n", "e", " ", "", "", ""], "END", "one ")


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_another_word() -> None:
    detokenizer = Detokenizer(BYTES, prompt_token_ids=[], stop=["END"])
    seen, stop = deltas(detokenizer, list(b"xENEN!"))
    assert (seen, stop) == (["x", "", "", "EN", "", "EN!"], None)


def test_the_beginning_of_a_stop_string_comes_out_when_the_text_ends_there() -> None:
    seen, stop = deltas(Detokenizer(BYTES, prompt_token_ids=[], stop=["END"]), list(b"xEN"))
    assert (seen, stop) == (["x", "", "EN"], None)


def test_a_stop_string_of_several_byte_characters_is_found() -> None:
    detokenizer = Detokenizer(BYTES, prompt_token_ids=[], stop=["€😀"])
    seen, stop = deltas(detokenizer, list("ä€€😀x".encode()))
    assert ("".join(seen), stop) == ("ä€", "€😀")


def test_the_first_of_several_stop_strings_counts() -> None:
    tokenizer = CountingTokenizer(words_tokenizer())
    detokenizer = Detokenizer(tokenizer, prompt_token_ids=[], stop=["world", "lo wor"])
    seen, stop = deltas(detokenizer, [0, 1])
    assert ("".join(seen), stop) == ("hel", "lo wor")


def test_the_stop_string_can_stay_in_the_text() -> None:
    detokenizer = Detokenizer(BYTES, prompt_token_ids=[], stop=["END"], include_stop=True)
    seen, stop = deltas(detokenizer, list(b"one END two"))
    assert ("".join(seen), stop) == ("one END", "END")


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    detokenizer = Detokenizer(BYTES, prompt_token_ids=list(b"EN"), stop=["END"])
    assert deltas(detokenizer, list(b"D."))[1] is None


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=25),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=7), max_size=4),
    include_stop=st.booleans(),
)
def test_tokens_of_several_characters_end_where_a_search_of_the_whole_text_ends(
    tokens: list[int], stop: list[str], include_stop: bool
) -> None:
    words = ("a", "bb", "aba", "abaabb")
    tokenizer = CountingTokenizer(LibraryTokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "a")))
    tokenizer.decode = lambda ids, **_: "".join(words[token] for token in ids)  # type: ignore[method-assign]
    detokenizer = Detokenizer(tokenizer, prompt_token_ids=[], stop=stop, include_stop=include_stop)
    seen, found = deltas(detokenizer, tokens)
    text, expected = "", None
    for token in tokens:
        text += words[token]
        hits = [(text.find(one), one) for one in stop if one in text]
        if hits:
            place, expected = min(hits, key=lambda hit: hit[0])
            text = text[: place + (len(expected) if include_stop else 0)]
            break
    assert ("".join(seen), found, detokenizer.text) == (text, expected, text)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abä€", max_size=60),
    stop=st.lists(st.text(alphabet="abä€", min_size=1, max_size=5), max_size=3),
)
def test_pieces_add_up_to_the_text_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(BYTES, prompt_token_ids=[], stop=stop)
    seen, found = deltas(detokenizer, list(text.encode()))
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    assert (found is not None) == bool(ends)
    # Bytes come one at a time, so the string that ends first is found first; of those, the one that begins first.
    assert "".join(seen) == detokenizer.text == (text[: min(ends)[1]] if ends else text)


def num_lines_executed(run: Callable[[], object]) -> int:
    """In the files of the engine."""
    count = 0

    def tracer(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        if "fastdeploy_dsa/engine" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def test_matching_costs_the_same_for_long_stop_strings_that_nearly_match_all_the_time() -> None:
    counts = []
    for length in (4, 256):
        stop = ["a" * (length - 1) + end for end in "bcde"]
        detokenizer = Detokenizer(BYTES, prompt_token_ids=[], stop=stop)
        deltas(detokenizer, list(b"a" * 300))
        counts.append(num_lines_executed(lambda: deltas(detokenizer, list(b"a" * 100))))  # noqa: B023 - run at once
    assert counts[1] <= counts[0] + 400  # measured: equal, but for the ends of the two windows


def test_a_token_copies_nothing_of_the_text_before_it() -> None:
    detokenizer = Detokenizer(BYTES, prompt_token_ids=[], stop=["END"])
    deltas(detokenizer, list(b"a" * 20_000))
    tracemalloc.start()
    try:
        for token in b"abcd":
            detokenizer.push(token)
            detokenizer.take(is_finished=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000


def words_tokenizer() -> LibraryTokenizer:
    """SentencePiece style: a leading space belongs to the word, and vanishes at the beginning of a text."""
    names = ["▁hello", "▁world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = LibraryTokenizer(models.BPE(vocab={name: place for place, name in enumerate(names)}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_words_keep_their_space_after_a_prompt_and_between_tokens() -> None:
    tokenizer = CountingTokenizer(words_tokenizer())
    assert deltas(Detokenizer(tokenizer, prompt_token_ids=[0]), [1, 2, 0] * 9)[0] == [" world", "!", " hello"] * 9


def test_byte_fallback_tokens_become_whole_characters() -> None:
    tokenizer = CountingTokenizer(words_tokenizer())
    tokens = [3 + byte for byte in "€😀".encode()]
    seen, _ = deltas(Detokenizer(tokenizer, prompt_token_ids=[0]), [1, *tokens, 2])
    assert seen == [" world", "", "", "€", "", "", "", "😀", "!"]
