"""Stop strings in a text that grows: every character is looked at once, however long text and strings are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Found(NamedTuple):
    """A stop string in a text, and how many characters the text has from its beginning on."""

    stop: str
    num_last: int


class StopStrings:
    """Where the end of a text stands in each of several stop strings (Knuth, Morris and Pratt's search).

    Attributes:
        held: Characters at the end of the text that may be the beginning of a stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Start with an empty text.

        Args:
            stop: None of them empty.
        """
        self._searches = [_Search(text) for text in stop]
        self.held = 0

    def feed(self, added: str) -> Found | None:
        """Take the next characters of the text.

        Returns:
            Of the stop strings that end in them, the one that begins first; those given first come first.
        """
        ends = [(search.feed(added), search.text) for search in self._searches]
        self.held = max((search.num_matched for search in self._searches), default=0)
        found = [Found(text, len(text) + len(added) - end) for end, text in ends if end is not None]
        return max(found, key=lambda one: one.num_last, default=None)


class _Search:
    """One string; num_matched is the length of its longest beginning that the text ends with."""

    __slots__ = ("_borders", "num_matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        # _borders[n]: length of the longest beginning of text[:n + 1], other than itself, that it also ends with.
        self._borders = [0] * len(text)
        length = 0
        for place in range(1, len(text)):
            length = self._extended(length, text[place])
            self._borders[place] = length

    def feed(self, added: str) -> int | None:
        """How many characters of `added` the first match needs; None if there is none."""
        matched = self.num_matched
        for place, character in enumerate(added):
            matched = self._extended(matched, character)
            if matched == len(self.text):
                self.num_matched = self._borders[-1]
                return place + 1
        self.num_matched = matched
        return None

    def _extended(self, matched: int, character: str) -> int:
        while self.text[matched] != character:
            if matched == 0:
                return 0
            matched = self._borders[matched - 1]
        return matched + 1
