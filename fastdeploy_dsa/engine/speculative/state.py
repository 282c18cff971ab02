"""What drafting keeps of a request between steps."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastdeploy_dsa.engine.speculative.draft_length import DraftLength


class HiddenRows(NamedTuple):
    """Rows begin .. end - 1 of a step's hidden states.

    Attributes:
        tensor: The runner's own; nobody else looks inside.
        begin: First row.
        end: Row behind the last.
    """

    tensor: Any
    begin: int
    end: int


class DraftState:
    """Of one request.

    Attributes:
        length: Chooses how many drafts it gets.
        undrafted: The target's hidden states of its newest computed positions, for which the draft model has no cache
            entries yet, or none that last; in order of position.
    """

    __slots__ = ("length", "undrafted")

    def __init__(self, length: DraftLength) -> None:
        """Start before the request's first token is computed."""
        self.length = length
        self.undrafted: list[HiddenRows] = []

    @property
    def num_undrafted(self) -> int:
        """Positions of `undrafted`."""
        return sum(rows.end - rows.begin for rows in self.undrafted)

    def keep_undrafted(self, count: int) -> None:
        """Forget all but the newest count positions of `undrafted`."""
        kept: list[HiddenRows] = []
        for rows in reversed(self.undrafted):
            if count > 0:
                kept.insert(0, rows._replace(begin=max(rows.begin, rows.end - count)))
                count -= rows.end - rows.begin
        self.undrafted = kept
