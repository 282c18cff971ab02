"""What the engine hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]


class TokenLogprob(NamedTuple):
    """Natural log-probability of a token before temperature and filters, and its place among all (1: most likely)."""

    logprob: float
    rank: int


Logprobs = list[dict[int, TokenLogprob]]


@dataclass(frozen=True)
class RequestDelta:
    """What a step added to one request.

    Attributes:
        request_id: As in RequestOutput.
        index: Place of the prompt in the call.
        text: New text; the deltas of a request add up to its output's text.
        token_ids: New tokens. A token that leaves a character incomplete arrives before its text.
        finish_reason: None as long as the request goes on.
        stop_reason: As in RequestOutput.
        logprobs: One entry per new token, if asked for.
        num_cached_tokens: As in RequestOutput.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: Logprobs | None
    num_cached_tokens: int


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Attributes:
        request_id: Unique within the LLM.
        prompt: The prompt's text; None if it came as token ids.
        prompt_token_ids: The prompt as the model saw it.
        text: The continuation; empty if the model has no tokenizer. Ends before the stop string or end token, and
            before bytes at the end that are no whole character.
        token_ids: Every generated token, the one that ended the request included.
        finish_reason: "stop": an end token, stop token or stop string; "length": max_tokens or the model's length.
        stop_reason: The stop token or stop string; None for the model's own end token.
        logprobs: One entry per token, if asked for.
        num_preemptions: How often it had to give its blocks to others, and went to the host or was computed again.
        num_cached_tokens: Prompt tokens that the cache had when the request first ran.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None
    logprobs: Logprobs | None
    num_preemptions: int
    num_cached_tokens: int
