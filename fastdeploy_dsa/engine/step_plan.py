"""What a step computes of each request, and within which limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cache_manager import WindowRoom
from fastdeploy_dsa.engine.request import Request

MAX_UNDRAFTED = 32
"""Tokens of a request at most that the target has computed and the draft model has not, between steps."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits of a step and of a request.

    Attributes:
        max_num_batched_tokens: Rows of a step; enough for max_num_seqs requests with all their drafts, so that a
            prefill gets on beside decode rows and no request ever has to do with fewer drafts.
        max_num_seqs: Requests that run at a time.
        max_model_len: Tokens of a request.
        block_size: Tokens of a block.
        num_speculative_tokens: Drafts of a request and step at most.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    num_speculative_tokens: int = 0

    def __post_init__(self) -> None:
        """Check the budget.

        Raises:
            ValueError: It is too small.
        """
        rows = 1 + self.num_speculative_tokens
        if self.max_num_batched_tokens < self.max_num_seqs * rows:
            each = f" of 1 + {self.num_speculative_tokens} rows each" if self.num_speculative_tokens else ""
            raise ValueError(
                f"max_num_batched_tokens: expected max_num_seqs ({self.max_num_seqs}){each} or more, "
                f"got {self.max_num_batched_tokens}"
            )

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def num_tokens_to_hold(self, request: Request) -> int:
        """Tokens that a request needs places for before it is computed up to its newest token.

        That is all known tokens and its drafts, which the target computes, and what the draft model reads to propose
        the next ones: all but the last of them, behind what the target computes. No token that the request can never
        feed to a model is among them, so drafts need no block that it would not need anyway in the end.
        """
        num_tokens = request.num_tokens + len(request.drafts) + self.num_ahead_tokens
        return min(num_tokens, request.max_cached_tokens)

    @property
    def num_ahead_tokens(self) -> int:
        """Positions behind the rows of a step that the draft model writes."""
        return max(0, self.num_speculative_tokens - 1)

    @property
    def num_lag_tokens(self) -> int:
        """Computed positions of a request, newest ones, that the draft model has not written for good."""
        return MAX_UNDRAFTED if self.num_speculative_tokens else 0

    @property
    def num_ring_tokens(self) -> int:
        """Positions of one request behind those that are complete, up to the last one that a step writes."""
        return self.num_lag_tokens + self.max_num_batched_tokens + self.num_ahead_tokens

    def window_room(self, *, has_snapshots: bool) -> WindowRoom:
        """What requests hold in the cache's window pools."""
        return WindowRoom(
            num_requests=self.max_num_seqs,
            num_step_tokens=self.max_num_batched_tokens + self.max_num_seqs * self.num_ahead_tokens,
            num_lag_tokens=self.num_lag_tokens,
            has_snapshots=has_snapshots,
        )

    @property
    def num_growth_blocks(self) -> int:
        """Blocks that a running request may take in a step, beyond those that it keeps."""
        return 1 + max(0, 2 * self.num_speculative_tokens - 1) // self.block_size


class Chunk(NamedTuple):
    """The next num_tokens tokens of a request, and drafts behind them.

    Attributes:
        request: Its num_computed tells where the chunk begins, until the step is committed.
        num_tokens: Known ones, at least 1.
        num_drafts: All drafts of the request, if its newest token is among the known ones; else none.
        is_last: Whether the newest token is, so that a new one follows.
    """

    request: Request
    num_tokens: int
    num_drafts: int
    is_last: bool

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return self.num_tokens + self.num_drafts

    @property
    def num_confirmed(self) -> int:
        """Rows whose tokens are final, counted when the request has got its new tokens: the rest is rolled back."""
        return self.request.num_tokens - 1 - self.request.num_computed if self.is_last else self.num_tokens
