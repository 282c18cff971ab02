"""Text from tokens, one at a time: whole characters only, and it ends at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastdeploy_dsa.engine.stop_strings import Found, StopStrings
from fastdeploy_dsa.engine.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most 4 bytes, so at most 3 replacement characters at the end can still become another one.
# Some decoders show the whole characters before an incomplete one as replacements, too, until it is complete; only in
# a window that is long and ends in nothing but replacements the bytes are really invalid.
_MAX_UNFINISHED = 3
# Tokens decoded together. The tail that stays when a window is full is long enough to start at the first byte of a
# character with some length of the range.
_FULL_WINDOW = 16
_TAIL_LENGTHS = range(6, 10)
_INVALID_WINDOW = 24
# The decoder of a tokenizer may treat the first token of a text differently, so some of the prompt goes in front.
_PROMPT_CONTEXT = 6


class Detokenizer:
    """The text of one request.

    Decoding token by token would be wrong, since a character may span tokens, and decoding everything at every token
    would be slow. A short window of the last tokens is decoded instead; its text grows only at the end. The text
    itself is kept in pieces, so that a token costs no more behind a long text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_token_ids: Sequence[int] | npt.NDArray[np.int64],
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """Start after a prompt.

        Args:
            tokenizer: Decodes.
            prompt_token_ids: The prompt, or its end.
            stop: Strings at which the text ends.
            include_stop: Whether the stop string stays in the text.
            skip_special_tokens: Whether special tokens give no text.
        """
        self._tokenizer = tokenizer
        self._stop = StopStrings(stop)
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._window = [int(token) for token in prompt_token_ids[-_PROMPT_CONTEXT:]]
        self._emitted = self._stable_length(self._decode(self._window))
        self._pieces: list[str] = []  # of the text that no stop string will take back
        self._num_taken = 0  # pieces
        self._held = ""  # the end that a stop string may begin with

    @property
    def text(self) -> str:
        """All text so far, without what may still change; put together anew every time."""
        return "".join(self._pieces) + self._held

    def push(self, token: int) -> str | None:
        """Append a token's text.

        Returns:
            The stop string that ends the text, if one does.
        """
        self._window.append(token)
        decoded = self._decode(self._window)
        stable = self._stable_length(decoded)
        added = decoded[self._emitted : stable]
        self._emitted = max(self._emitted, stable)
        if len(self._window) >= _FULL_WINDOW:
            self._shorten(decoded)
        if not added:
            return None
        text = self._held + added
        found = self._stop.feed(added)
        if found is not None:
            self._end(text, found)
            return found.stop
        self._settle(text, num_held=self._stop.held)
        return None

    def take(self, *, is_finished: bool) -> str:
        """Text that no earlier call has returned; the beginning of a stop string only once the request is finished."""
        if is_finished:
            self._settle(self._held, num_held=0)
        new = self._pieces[self._num_taken :]
        self._num_taken = len(self._pieces)
        return "".join(new)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special_tokens)

    def _stable_length(self, decoded: str) -> int:
        """Length of the window's text without the end that may be an incomplete character."""
        unfinished = len(decoded) - len(decoded.rstrip(_REPLACEMENT))
        if len(self._window) >= _INVALID_WINDOW:
            unfinished = min(unfinished, _MAX_UNFINISHED)
        return len(decoded) - unfinished

    def _shorten(self, decoded: str) -> None:
        for length in _TAIL_LENGTHS:
            tail = self._window[-length:]
            text = self._decode(tail)
            dropped = len(decoded) - len(text)
            # Otherwise the tail begins inside a character; the next token gives another chance.
            if decoded.endswith(text) and dropped <= self._emitted:
                self._window = tail
                self._emitted -= dropped
                return

    def _end(self, text: str, found: Found) -> None:
        begin = len(text) - found.num_last
        self._settle(text[: begin + len(found.stop) if self._include_stop else begin], num_held=0)

    def _settle(self, text: str, *, num_held: int) -> None:
        """Take over the text behind the pieces, and hold back the last characters of it."""
        end = len(text) - num_held
        if end:
            self._pieces.append(text[:end])
        self._held = text[end:]
