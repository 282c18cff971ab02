"""One request on its way through the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NewType

import numpy as np
import numpy.typing as npt

from cache_manager import BlockId, BlockTable
from fastdeploy_dsa.engine.detokenizer import Detokenizer
from fastdeploy_dsa.engine.outputs import FinishReason, Logprobs, RequestDelta, RequestOutput
from fastdeploy_dsa.engine.sampling_params import SamplingParams
from fastdeploy_dsa.engine.speculative.acceptance import Draft
from fastdeploy_dsa.engine.speculative.state import DraftState

SlotLine = NewType("SlotLine", int)
"""A running request's line in the scheduler's block table."""


class Request:
    """State of a request. The scheduler gives and takes table and line; the engine appends tokens.

    A request runs if it has a line. It waits without a table, or with one that is on the host.

    Attributes:
        request_id: Unique within the engine.
        index: Place of the prompt in its call.
        number: Order of arrival, given by the engine; smaller is older.
        params: What was asked for.
        max_tokens: params.max_tokens, cut to what model and cache allow.
        random_key: Two 64-bit words that select the request's random numbers.
        tokens: [num_prompt + max_tokens] int64, prompt, then output; valid up to num_tokens.
        num_preemptions: How often it had to give way.
        num_reported: Generated tokens that a delta has reported.
        num_cached_tokens: Prompt tokens that the cache had when it first ran; None before that.
        table: Its blocks in the cache manager; None before it runs, and when it has to be computed again.
        line: While running.
        drafts: Proposals for the tokens behind the newest one, which the next step verifies.
        draft_state: What drafting keeps of it; None without drafting.
    """

    __slots__ = (
        "detokenizer",
        "draft_state",
        "drafts",
        "finish_reason",
        "index",
        "line",
        "logprobs",
        "max_tokens",
        "num_cached_tokens",
        "num_preemptions",
        "num_prompt",
        "num_reported",
        "num_tokens",
        "number",
        "params",
        "prompt",
        "random_key",
        "request_id",
        "stop_reason",
        "table",
        "tokens",
    )

    def __init__(
        self,
        *,
        request_id: str,
        index: int,
        prompt: str | None,
        prompt_token_ids: Sequence[int] | npt.NDArray[np.int64],
        params: SamplingParams,
        max_tokens: int,
        random_key: tuple[int, int],
        detokenizer: Detokenizer | None,
    ) -> None:
        """Make a request that has not run yet."""
        self.request_id = request_id
        self.index = index
        self.number: int | None = None
        self.prompt = prompt
        self.params = params
        self.max_tokens = max_tokens
        self.random_key = random_key
        self.detokenizer = detokenizer
        self.num_prompt = len(prompt_token_ids)
        self.tokens: npt.NDArray[np.int64] = np.empty(self.num_prompt + max_tokens, np.int64)
        self.tokens[: self.num_prompt] = prompt_token_ids
        self.num_tokens = self.num_prompt
        self.num_preemptions = 0
        self.num_reported = 0
        self.num_cached_tokens: int | None = None
        self.table: BlockTable | None = None
        self.line: SlotLine | None = None
        self.drafts: list[Draft] = []
        self.draft_state: DraftState | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: Logprobs = []

    @property
    def blocks(self) -> list[BlockId]:
        """Its blocks on the device in order of position; nobody changes the list but the cache manager."""
        return [] if self.table is None else self.table.blocks

    @property
    def num_computed(self) -> int:
        """Tokens whose cache entries exist, here or on the host; at most num_tokens - 1 between steps."""
        return 0 if self.table is None else self.table.num_computed

    @property
    def known_tokens(self) -> npt.NDArray[np.int64]:
        """[num_tokens] view of tokens."""
        return self.tokens[: self.num_tokens]

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that may need a cache entry: all but the last, which is never fed to the model."""
        return self.num_prompt + self.max_tokens - 1

    @property
    def num_left(self) -> int:
        """Tokens that may still follow."""
        return self.num_prompt + self.max_tokens - self.num_tokens

    @property
    def num_undrafted(self) -> int:
        """Newest computed tokens for which the draft model has no cache entries yet."""
        return 0 if self.draft_state is None else self.draft_state.num_undrafted

    def append(self, token: int) -> None:
        """Take over the next token."""
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1

    def drop_table(self) -> None:
        """The table is closed: everything is to be computed again, by the draft model too. Drafts stay good."""
        self.table = None
        if self.draft_state is not None:
            self.draft_state.undrafted.clear()

    def take_delta(self) -> RequestDelta | None:
        """What came since the last call; None if nothing did."""
        begin = self.num_prompt + self.num_reported
        if begin == self.num_tokens:
            return None
        tokens = self.tokens[begin : self.num_tokens].tolist()
        logprobs = None if self.params.logprobs is None else self.logprobs[self.num_reported :]
        self.num_reported += len(tokens)
        is_finished = self.finish_reason is not None
        return RequestDelta(
            request_id=self.request_id,
            index=self.index,
            text="" if self.detokenizer is None else self.detokenizer.take(is_finished=is_finished),
            token_ids=tokens,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=logprobs,
            num_cached_tokens=self.num_cached_tokens or 0,
        )

    def output(self) -> RequestOutput:
        """The finished request's result."""
        assert self.finish_reason is not None, "the request is not finished"  # noqa: S101 - a bug of the engine
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.tokens[: self.num_prompt].tolist(),
            text="" if self.detokenizer is None else self.detokenizer.text,
            token_ids=self.tokens[self.num_prompt : self.num_tokens].tolist(),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=None if self.params.logprobs is None else self.logprobs,
            num_preemptions=self.num_preemptions,
            num_cached_tokens=self.num_cached_tokens or 0,
        )
