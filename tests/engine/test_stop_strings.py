"""Stop strings are found where a search of the whole text finds them, however the text is cut into pieces."""

from __future__ import annotations

import itertools

import pytest

from fastdeploy_dsa.engine.stop_strings import Found, StopStrings


def strings(alphabet: str, lengths: range) -> list[str]:
    return ["".join(letters) for length in lengths for letters in itertools.product(alphabet, repeat=length)]


@pytest.mark.parametrize("piece", [1, 3])
@pytest.mark.parametrize("stop", strings("ab", range(1, 6)))
def test_every_short_string_is_found_in_every_short_text(stop: str, piece: int) -> None:
    for text in strings("ab", range(9, 10)):
        search, seen = StopStrings([stop]), ""
        for begin in range(0, len(text), piece):
            found = search.feed(text[begin : begin + piece])
            seen += text[begin : begin + piece]
            place = seen.find(stop)
            assert found == (Found(stop, len(seen) - place) if place >= 0 else None), (text, seen)
            if found is not None:
                break
            assert search.held == max(n for n in range(len(stop)) if seen.endswith(stop[:n])), (text, seen)


def test_of_strings_that_end_in_one_piece_the_one_that_begins_first_counts() -> None:
    assert StopStrings(["world", "lo wor"]).feed("hello world!") == Found("lo wor", 9)
    assert StopStrings(["lo", "lo wor"]).feed("hello world!") == Found("lo", 9)
    assert StopStrings(["lo wor", "lo"]).feed("hello world!") == Found("lo wor", 9)


def test_what_is_held_is_the_longest_beginning_of_any_string() -> None:
    search = StopStrings(["END", "a longer one"])
    assert (search.feed("so a long"), search.held) == (None, 6)
    assert (search.feed("E"), search.held) == (None, 1)
    assert (search.feed("!"), search.held) == (None, 0)


def test_without_strings_nothing_is_found_or_held() -> None:
    search = StopStrings([])
    assert (search.feed("any text"), search.held) == (None, 0)
