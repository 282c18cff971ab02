"""How messages show a user's values, short, whatever the value is, and name a mistake by its code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 80


class CodedError(ValueError):
    """A mistake that the documentation lists by a code.

    Attributes:
        code: Of the list in question.
    """

    def __init__(self, code: str, message: str) -> None:
        """Make the error; its text starts with the code."""
        super().__init__(f"{code}: {message}")
        self.code = code


def shown(value: object) -> str:
    """repr of a value on one line of at most 80 characters; values that have none are named by their type."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested without end, or an int of more digits than Python writes
        return f"a {type(value).__name__} too large to show"
    text = text if text.isprintable() else ascii(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name that is spelled most like the given one."""
    return difflib.get_close_matches(str(name)[:_LONGEST], sorted(known), n=1, cutoff=0.0)[0]
